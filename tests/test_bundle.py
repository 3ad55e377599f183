"""Manifests, finding bundles, and folders that appear whole or not at all."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from vlquant.bundle import Manifest, Source, changed_files, find_bundle, missing_files, read_manifest, write_manifest
from vlquant.errors import BrokenCheckpoint, OutputRefused
from vlquant.inspect import inspect
from vlquant.publishing import publishing, require_replaceable, require_space
from vlquant.recipe import Recipe
from vlquant.shards import ShardWriter, file_hash


def make_bundle(folder, **changes):
    """A folder that is a bundle as far as its manifest goes."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    fields = {
        "name": folder.name,
        "source": Source(name="tiny", files={"config.json": "00"}),
        "source_config": {"model_type": "internvl_chat"},
        "recipe": Recipe().to_dict(),
        "calibration": None,
        "modules": [],
        "libraries": {"torch": "2"},
        "files": {"model.safetensors": file_hash(folder / "model.safetensors")},
        "sizes": {"model.safetensors": 7},
    }
    write_manifest(folder, Manifest(**fields | changes))
    return folder


def test_manifest_reads_back(tmp_path):
    folder = make_bundle(tmp_path / "a")
    assert read_manifest(folder).recipe == Recipe().to_dict()
    before = (folder / "vlquant.json").read_bytes()
    write_manifest(folder, read_manifest(folder))
    assert (folder / "vlquant.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "upgrade vlquant"),
        ({"sizes": "many"}, "damaged at sizes"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_manifest_of_another_kind_is_refused(tmp_path, change, words):
    folder = make_bundle(tmp_path / "a")
    path = folder / "vlquant.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BrokenCheckpoint, match=words) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "{'a': 1}"])
def test_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "vlquant.json").write_text(text)
    with pytest.raises(BrokenCheckpoint, match="quantize the model again"):
        read_manifest(tmp_path)


def test_damage_is_noticed(tmp_path):
    folder = make_bundle(tmp_path / "a")
    manifest = read_manifest(folder)
    assert missing_files(folder, manifest) == changed_files(folder, manifest) == []
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    assert missing_files(folder, manifest) == []
    assert changed_files(folder, manifest) == ["model.safetensors"]
    (folder / "model.safetensors").write_bytes(b"weight")
    assert missing_files(folder, manifest) == ["model.safetensors"]


def test_bundle_is_found_where_it_should_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_bundle() is None
    for age, name in enumerate(("old", "new", "incomplete", ".old.killed.partial")):
        folder = make_bundle(tmp_path / name)
        os.utime(folder / "vlquant.json", (1000 + age, 1000 + age))
    (tmp_path / "incomplete" / "model.safetensors").unlink()
    assert find_bundle().name == "new"
    assert find_bundle("old").name == "old"
    monkeypatch.chdir(tmp_path / "old")
    assert (find_bundle() / "vlquant.json").samefile(tmp_path / "old" / "vlquant.json")


def test_named_folder_has_to_be_a_whole_bundle(tmp_path):
    with pytest.raises(BrokenCheckpoint, match="vlquant quantize"):
        find_bundle(tmp_path)
    folder = make_bundle(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match="model.safetensors"):
        find_bundle(folder)


def test_published_folder_is_complete_and_replaces_the_old(tmp_path):
    output = make_bundle(tmp_path / "sub" / "out")
    with publishing(output) as hidden:
        (hidden / "new.txt").write_text("new")
        assert (output / "model.safetensors").exists() and hidden.parent == output.parent
    assert [path.name for path in output.iterdir()] == ["new.txt"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [KeyError("x"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_failure_leaves_what_was_there(tmp_path, failure):
    output = make_bundle(tmp_path / "out")
    with pytest.raises(type(failure)), publishing(output) as hidden:
        (hidden / "half").write_text("half")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert missing_files(output, read_manifest(output)) == []


def test_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(OutputRefused, match="no space left") as caught, publishing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_runs_go_and_those_of_running_ones_stay(tmp_path):
    (tmp_path / ".out.deadbeef.partial").mkdir()
    with publishing(tmp_path / "out") as running:
        assert not (tmp_path / ".out.deadbeef.partial").exists()
        (running / "data").write_text("mine")
        with publishing(tmp_path / "out") as second:
            (second / "data").write_text("second")
        assert (running / "data").read_text() == "mine"
    assert (tmp_path / "out" / "data").read_text() == "mine"


def test_leftovers_go_whatever_the_name(tmp_path):
    (tmp_path / ".a[1].deadbeef.partial").mkdir()
    with publishing(tmp_path / "a[1]") as hidden:
        (hidden / "data").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["a[1]"]


def test_of_a_link_is_replaced_what_it_leads_to(tmp_path):
    target, link = make_bundle(tmp_path / "big" / "disk"), tmp_path / "link"
    link.symlink_to(target)
    with publishing(link) as hidden:
        assert hidden.parent == target.parent
        (hidden / "data").write_text("mine")
    assert link.is_symlink() and (target / "data").read_text() == "mine"


@pytest.mark.parametrize("output", [".", "..", "../here", "../link"])
def test_the_current_folder_is_refused_before_the_work(tmp_path, monkeypatch, output):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputRefused, match="name a new folder"), publishing(Path(output)):
        raise AssertionError("the work was begun")
    assert {path.name for path in tmp_path.rglob("*")} == {"here", "link"}


def test_what_cannot_be_renamed_stays(tmp_path, monkeypatch):
    output = make_bundle(tmp_path / "out")

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OutputRefused, match="out cannot be replaced .Device or resource busy."), publishing(output):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert missing_files(output, read_manifest(output)) == []


def test_only_bundles_are_ever_replaced(tmp_path):
    require_replaceable(tmp_path / "free", overwrite=False)
    (tmp_path / "empty").mkdir()
    require_replaceable(tmp_path / "empty", overwrite=False)
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(OutputRefused, match="--overwrite"):
        require_replaceable(bundle, overwrite=False)
    require_replaceable(bundle, overwrite=True)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_text("")
    for overwrite in (False, True):
        with pytest.raises(OutputRefused, match="-o"):
            require_replaceable(tmp_path / "holiday", overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputRefused, match="not a folder"):
        require_replaceable(tmp_path / "file", overwrite=True)


def test_space_is_checked_before_anything_is_read(tmp_path):
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(OutputRefused, match="GB free"):
        require_space(tmp_path / "a" / "b", 2**60)
    assert list(tmp_path.iterdir()) == []


def test_little_space_is_told_in_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=700_000))
    with pytest.raises(OutputRefused, match="needs 0.9 MB and its disk has 0.7 MB free; make room"):
        require_space(tmp_path / "out", 900_000)
    with pytest.raises(OutputRefused, match="needs 0.1 GB and its disk has 0.7 MB free"):
        require_space(tmp_path / "out", 100_000_000)


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES])
def test_no_room_is_asked_for_where_nothing_can_be_written(reason, tmp_path, monkeypatch):
    def refuse(*given, **named):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputRefused, match=rf"out cannot be written \({os.strerror(reason)}\); choose another folder with -o"):
        require_space(tmp_path / "out", 1)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a system without /proc")
def test_what_is_no_disk_cannot_be_written():
    with pytest.raises(OutputRefused, match="/proc/out cannot be written"):
        require_space(Path("/proc/out"), 1)


def test_shards_read_back(tmp_path):
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "brain": torch.randn(3, 5).to(torch.bfloat16),
        "half": torch.randn(4).to(torch.float16),
        "codes": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "scalar": torch.tensor(0, dtype=torch.uint8),
        "signed": torch.tensor([-1], dtype=torch.int8),
    }
    for name, shard_bytes, files in (("one", 10**6, 1), ("many", 30, 4)):
        folder = tmp_path / name
        folder.mkdir()
        writer = ShardWriter(folder, shard_bytes=shard_bytes)
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        writer.close()
        paths = sorted(folder.glob("*.safetensors"))
        read = {key: tensor for path in paths for key, tensor in load_file(path).items()}
        assert len(paths) == files and read.keys() == tensors.keys()
        assert all(torch.equal(read[key], tensors[key]) and read[key].dtype == tensors[key].dtype for key in tensors)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["odd"] == "model-00001-of-00004.safetensors"
    assert index["weight_map"].keys() == tensors.keys()


def test_inspect_prints_and_verifies(tmp_path):
    folder = make_bundle(tmp_path / "a")
    with Console(record=True, width=100, file=open(os.devnull, "w")) as console:
        assert inspect(folder, verify=True, console=console) == folder
    text = console.export_text()
    assert "tiny" in text and "group_size 128" in text and "every file is as it was written" in text
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(BrokenCheckpoint, match="model.safetensors"):
        inspect(folder, verify=True, console=console)
