"""What killed and interrupted commands leave behind: nobody is confused by it, the next command clears it away, Ctrl-C says what is kept."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlquant.check import loaded_bytes
from vlquant.cli import app
from vlquant.export.vision import export_vision
from vlquant.inspect import inspect
from vlquant.publishing import publishing, sweep
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime.chat import chat
from vlquant.runtime.generate import Generation
from vlquant.unfinished import UnfinishedRun

from tests.golden_folder import golden_folder

ROOT = Path(__file__).parents[1]
SOURCE = golden_folder() / "internlm2_chat_ntk"
BNB = Recipe(method="bnb")
DIE_WHILE_WRITING = """
import os, signal, sys
from vlquant.export.vision import export_vision
def die(event):
    if event.done:
        os.kill(os.getpid(), signal.SIGKILL)
export_vision(sys.argv[1], precision="int8", report=die)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle with its vision tower in float32."""
    bundle = quantize(SOURCE, recipe=BNB, output=tmp_path_factory.mktemp("bundle") / "small")
    export_vision(bundle)
    return bundle


@pytest.fixture
def bundle(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "small")


@pytest.fixture
def killed(bundle):
    """The bundle after an export in int8 was killed while it wrote."""
    run = subprocess.run([sys.executable, "-c", DIE_WHILE_WRITING, bundle], cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL and len(leftovers(bundle)) == 1, run.stderr
    return bundle


def leftovers(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_a_killed_export_left_confuses_nobody(killed, exported):
    (left,) = leftovers(killed)
    (left / "model.data").write_bytes(bytes(10**6))
    inspect(killed, verify=True)
    chat("What?", model=killed, generation=Generation(max_new_tokens=1), report=str)
    shutil.rmtree(killed / "runtime", ignore_errors=True)
    assert loaded_bytes(killed, killed / "vision") == loaded_bytes(exported, exported / "vision")


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_the_next_export_clears_it_away(precision, killed):
    """That of another precision too, though the float32 tower is there and nothing has to be written."""
    export_vision(killed, precision=precision)
    assert leftovers(killed) == []


def test_quantizing_again_clears_away_what_a_killed_one_left_beside_the_bundle(bundle):
    (bundle.parent / ".small.abcdefgh.partial").mkdir()
    manifest = (bundle / "vlquant.json").read_bytes()
    assert quantize(SOURCE, recipe=BNB, output=bundle) == bundle
    assert leftovers(bundle.parent) == [] and (bundle / "vlquant.json").read_bytes() == manifest


def test_sweeping_gives_back_what_was_moved_aside_and_leaves_who_is_at_work(bundle):
    aside = bundle.parent / ".small.abcdefgh.partial"
    aside.mkdir()
    bundle.rename(aside / "small")
    with publishing(bundle.parent / "other") as hidden:
        sweep(bundle)
        sweep(bundle.parent / "other")
        assert hidden.is_dir() and (bundle / "vlquant.json").is_file() and not aside.exists()


@pytest.mark.parametrize("finished", [0, 1])
@pytest.mark.parametrize("how", [(), ("--json",)])
def test_ctrl_c_says_what_is_kept_if_anything_is(finished, how, tmp_path, monkeypatch):
    keep = UnfinishedRun.keep

    def interrupt(run, index, layer):
        if index == finished:
            raise KeyboardInterrupt
        keep(run, index, layer)

    monkeypatch.setattr(UnfinishedRun, "keep", interrupt)
    command = ["quantize", str(SOURCE), "--method", "bnb", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, *how])
    said = [line for line in done.stderr.splitlines() if "interrupted" in line]
    assert done.exit_code == 130 and len(said) == finished and len(leftovers(tmp_path)) == finished and not done.stdout
    if finished:
        assert "what is finished is kept: repeat the command, which goes on after layer 1" in said[0]
        monkeypatch.undo()
        again = CliRunner().invoke(app, command)
        assert again.exit_code == 0 and "going on after layer 1 of 2" in again.stderr
