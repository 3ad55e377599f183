"""The kernels' own copy of a bundle's weights: who may read it, what killed processes leave, and what follows a change."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch

from vlquant.errors import BrokenCheckpoint
from vlquant.inspect import inspect
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.publishing import replacing
from vlquant.recipe import Recipe
from vlquant.runtime import packed_weights
from vlquant.runtime.chat import chat
from vlquant.runtime.generate import Generation
from vlquant.runtime.loading import load_decoder
from vlquant.runtime.native import packed_matrix
from vlquant.runtime.packed_weights import FILE, changed_packed, joined, keep_packed, parts, places, read_packed
from vlquant.shards import write_safetensors

from tests.golden_folder import golden_folder

SOURCE = golden_folder() / "qwen2_internvl2_5_vit6b"
TENSORS = {"a.codes": torch.arange(512, dtype=torch.uint8).view(1, 1, 512), "a.scales": torch.ones(1, 1, 16).half()}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    recipe = Recipe(method="rtn", bits=4, group_size=32)
    return quantize(SOURCE, recipe=recipe, output=tmp_path_factory.mktemp("packed") / "bundle")


def test_others_may_read_it(tmp_path):
    before = os.umask(0o027)
    try:
        keep_packed(tmp_path / FILE, TENSORS, "source")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o640
    assert torch.equal(read_packed(tmp_path / FILE, "source")["a.codes"], TENSORS["a.codes"])
    assert read_packed(tmp_path / FILE, "another") is None


def test_what_a_killed_process_left_is_swept(tmp_path):
    code = (
        "import os, sys, torch; from pathlib import Path; from vlquant.runtime import packed_weights\n"
        "def die(path, *given, **named): path.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "packed_weights.write_safetensors = die\n"
        "packed_weights.keep_packed(Path(sys.argv[1]), {'a': torch.ones(1)}, 'source')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / FILE]).returncode == -signal.SIGKILL
    folder = (tmp_path / FILE).parent
    assert [each.read_bytes() for each in folder.iterdir()] == [b"half"]
    keep_packed(tmp_path / FILE, TENSORS, "source")
    assert [each.name for each in folder.iterdir()] == ["cpu.safetensors"]


def test_two_processes_write_files_of_their_own(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:  # The second leaves the first's alone: it is at work.
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert not path.exists()
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_inspect_finds_a_change_in_it(bundle):
    load_decoder(open_model(bundle))
    path = bundle / FILE
    inspect(bundle, verify=True)
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    inspect(bundle)
    with pytest.raises(BrokenCheckpoint, match="runtime/cpu.safetensors has changed or gone; delete runtime/"):
        inspect(bundle, verify=True)
    write_safetensors(path, TENSORS, metadata={"source": "of an older version"})
    assert changed_packed(bundle) == []
    path.write_bytes(b"no such file")
    assert changed_packed(bundle) == [FILE]
    path.unlink()
    assert changed_packed(bundle) == []


def test_in_the_cache_a_bundle_takes_the_place_of_the_one_before(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packed_weights, "keep_packed", refusing(bundle))
    model = open_model(bundle)
    load_decoder(model)
    (kept,) = tmp_path.rglob("*.safetensors")
    assert kept == places(bundle)[1] and not (bundle / FILE).exists()
    monkeypatch.setattr(packed_weights, "FORMAT", "another")
    load_decoder(model)
    assert list(tmp_path.rglob("*.safetensors")) == [kept] and read_packed(kept, packed_weights.source_of(bundle))


def refusing(*folders):
    """As folders that cannot be written to."""
    keep = packed_weights.keep_packed

    def keep_elsewhere(path, *given):
        if any(path.is_relative_to(folder) for folder in folders):
            raise PermissionError
        keep(path, *given)

    return keep_elsewhere


def test_inspect_finds_a_change_in_the_cache(bundle, tmp_path, monkeypatch):
    """Read and damaged there, it gives wrong answers as well as in the bundle."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packed_weights, "keep_packed", refusing(bundle))
    load_decoder(open_model(bundle))
    own, kept = places(bundle)
    inspect(bundle, verify=True)
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not own.exists() and kept.is_relative_to(tmp_path)
    with pytest.raises(BrokenCheckpoint, match=f"{kept} has changed or gone; delete {kept} "):
        inspect(bundle, verify=True)
    weights = bundle / "model.safetensors"
    whole = weights.read_bytes()
    try:  # Quantized again to the same bytes, the bundle would still be answered for by this file.
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BrokenCheckpoint, match=f"delete {kept} .* and quantize the model again"):
            inspect(bundle, verify=True)
    finally:
        weights.write_bytes(whole)
    kept.unlink()
    inspect(bundle, verify=True)


@pytest.mark.parametrize("absent", ["0.self_attn.q_proj.bias", "1.mlp.down_proj.scales", "head.codes"])
def test_a_file_that_lacks_a_tensor_is_made_again(absent, bundle):
    model = open_model(bundle)
    load_decoder(model)
    path, source = bundle / FILE, packed_weights.source_of(bundle)
    whole = path.read_bytes()
    keep_packed(path, {name: tensor.clone() for name, tensor in read_packed(path, source).items() if name != absent}, source)
    assert absent not in read_packed(path, source)
    load_decoder(model)
    assert path.read_bytes() == whole
    path.unlink()


def test_where_nothing_can_be_kept_chat_says_so(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []
    for refused in ([bundle, tmp_path], [bundle], []):
        with monkeypatch.context() as patch:
            patch.setattr(packed_weights, "keep_packed", refusing(*refused))
            chat("What?", model=bundle, vision="torch", generation=Generation(max_new_tokens=1), report=said.append)
    assert [each for each in said if "every load packs" in each] == said[1:2] and len(said) == 4
    assert str(bundle / "runtime") in said[1] and str(tmp_path / "vlquant" / "packed") in said[1]


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch):
    def fail(path, *given, **named):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(packed_weights, "write_safetensors", fail)
    (tmp_path / "ours").mkdir()
    for path in (tmp_path / "new" / "newer" / "file", tmp_path / "ours" / "file"):
        with pytest.raises(OSError, match="no space"):
            keep_packed(path, TENSORS, "source")
    assert [*tmp_path.rglob("*")] == [tmp_path / "ours"]


def test_a_factor_comes_back(bundle, tmp_path):
    model = open_model(bundle)
    matrix = packed_matrix(torch.ones(64, 32, dtype=torch.uint8), torch.full((1, 64), 1e-7), torch.ones(64), bits=8)
    assert matrix.factor < 1
    keep_packed(tmp_path / FILE, {f"0.self_attn.q_proj.{kind}": each for kind, each in parts(matrix).items()}, "source")
    again = joined(read_packed(tmp_path / FILE, "source"), model)["0.self_attn.q_proj"]
    assert again.factor == matrix.factor and again.rows == 64 and torch.equal(again.scales, matrix.scales)
