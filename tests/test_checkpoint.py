"""The safetensors reader: equal to the reference reader, and one sentence for every way a download goes wrong."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from vlquant.checkpoint import DTYPES, open_checkpoint, read_json
from vlquant.errors import BrokenCheckpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three shards with an index."""
    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(7)}
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_reads_what_safetensors_reads(case):
    checkpoint = open_checkpoint(case.folder)
    expected = case.stored
    assert set(checkpoint.names) == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.dtype(name) == tensor.dtype and checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(tmp_path, dtype):
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    save_file({"x": tensor, "none": torch.empty(0, 3, dtype=dtype)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("x").dtype == dtype
    assert torch.equal(checkpoint.read("x").float(), tensor.float())
    assert checkpoint.read("none").shape == (0, 3)


def test_shards(folder):
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint) == ["a.weight", "b.weight", "c"] and len(checkpoint) == 3
    assert checkpoint.read("a.weight").tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert checkpoint.read("c").item() == 7 and "d" not in checkpoint
    with pytest.raises(BrokenCheckpoint, match="tensor d is missing"):
        checkpoint.read("d")


def refused(folder, *words):
    with pytest.raises(BrokenCheckpoint) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_missing_shard_is_named(folder):
    (folder / "model-1.safetensors").unlink()
    refused(folder, "model-1.safetensors", "download")


def test_an_index_that_promises_too_much(folder):
    save_file({"other": torch.ones(1)}, folder / "model-1.safetensors")
    refused(folder, "b.weight", "absent from the shards")


def test_an_index_without_a_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "weight_map")


@pytest.mark.parametrize("target", ["model-1.safetensors", "model.safetensors.index.json"])
def test_git_lfs_pointers(folder, target):
    (folder / target).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    refused(folder, target, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files(folder, keep):
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model-0.safetensors", "truncated")


@pytest.mark.parametrize("start", [b"\xff" * 7 + b"\x7f", b"<!DOCTYPE html>", b"\0" * 40, b"\x10" + b"\0" * 7 + b"not a header"])
def test_what_is_no_safetensors_file_is_not_called_truncated(folder, start):
    path = folder / "model-0.safetensors"
    path.write_bytes(start + path.read_bytes()[len(start):])
    refused(folder, "model-0.safetensors", "is no safetensors file, or is damaged where it begins", "download it again")


@pytest.mark.parametrize("name", ["model-0.safetensors", "model.safetensors.index.json"])
def test_a_folder_in_place_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name, "cannot be read (Is a directory)")


def test_a_file_that_shrinks_after_opening(folder):
    checkpoint = open_checkpoint(folder)
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BrokenCheckpoint, match="truncated"):
        checkpoint.read("a.weight")


@pytest.mark.parametrize("whole_reads", [True, False])
def test_rows_are_those_of_the_file_that_was_opened(folder, monkeypatch, whole_reads):
    if not whole_reads:
        monkeypatch.delattr("os.pread")
    rows, path = open_checkpoint(folder).open_rows("a.weight"), folder / "model-0.safetensors"
    save_file({"0": torch.full((9, 4), 7.0), "a.weight": torch.full((3, 4), 7.0)}, folder / "new")
    (folder / "new").rename(path)
    assert rows(torch.tensor([2, 0, 2])).tolist() == [[8, 9, 10, 11], [0, 1, 2, 3], [8, 9, 10, 11]]
    assert rows(torch.tensor([], dtype=torch.int64)).shape == (0, 4)


@pytest.mark.parametrize("wrong", [[3], [-1], [0, 3], [2**40]])
def test_rows_that_are_not_there(folder, wrong):
    with pytest.raises(IndexError, match="of a tensor that has 3"):
        open_checkpoint(folder).open_rows("a.weight")(torch.tensor(wrong))


def test_rows_of_a_file_that_shrinks_after_opening(folder):
    rows, path = open_checkpoint(folder).open_rows("a.weight"), folder / "model-0.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 4)
    assert rows(torch.tensor([1])).tolist() == [[4, 5, 6, 7]]
    with pytest.raises(BrokenCheckpoint, match="truncated"):
        rows(torch.tensor([2]))


def test_rows_close_their_file(folder):
    rows = open_checkpoint(folder).open_rows("a.weight")
    file = rows._file
    os.fstat(file)
    del rows
    with pytest.raises(OSError):
        os.fstat(file)


def test_bytes_too_many(folder):
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes() + b"xx")
    refused(folder, "2 bytes longer")


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[]",
        '{"a": 3}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1]}}',
    ],
)
def test_headers_that_make_no_sense(tmp_path, header):
    content = len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, "model.safetensors", "download it again")


def test_folders_without_weights(tmp_path):
    refused(tmp_path / "absent", "is not a folder")
    refused(tmp_path, "no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pickled")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_json_that_is_none(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match="x.json"):
        read_json(path)
