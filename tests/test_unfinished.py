"""Quantizing that is killed, runs out of disk or is asked for something else goes on, or says why not."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlquant.errors import OutputRefused
from vlquant.events import Event
from vlquant.quantize import quantize
from vlquant.quantized_layers import QuantizedLayer
from vlquant.recipe import Recipe
from vlquant.unfinished import difference, resuming

from tests.golden_folder import golden_folder

ROOT = Path(__file__).parents[1]
SOURCE = golden_folder() / "internlm2_internvl2_5"
GPTQ = Recipe(group_size=32, samples=2)
RECIPES = {"gptq": GPTQ, "rtn": Recipe(method="rtn", group_size=32), "bnb": Recipe(method="bnb", bits=8)}
RUN = """
import sys, resource
from vlquant.errors import OutputRefused
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
limit = int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    quantize(sys.argv[1], recipe=Recipe.from_dict(eval(sys.argv[2])), output=sys.argv[3], report=lambda event: print(event, flush=True))
except OutputRefused as error:
    print("refused:", error)
"""


def start(recipe, output, limit=0):
    """The quantizer in a process of its own, its events on standard output."""
    command = [sys.executable, "-c", RUN, str(SOURCE), repr(recipe.to_dict()), str(output), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Bundles made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {name: contents(quantize(SOURCE, recipe=recipe, output=folder / name)) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(name, seed, undisturbed, tmp_path):
    moments = random.Random(seed)
    process = start(RECIPES[name], tmp_path / "out")
    for _ in range(moments.randint(1, 6)):
        process.stdout.readline()
    time.sleep(moments.random() * 0.2)
    process.kill()
    process.wait()
    events = []
    quantize(SOURCE, recipe=RECIPES[name], output=tmp_path / "out", report=events.append)
    assert contents(tmp_path / "out") == undisturbed[name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_told_to_end_the_command_goes_on_to_the_same_bytes_when_repeated(undisturbed, tmp_path):
    options = ["--group-size", "32", "--samples", "2", "--json", "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "vlquant", "quantize", *options, str(SOURCE)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert any('"stage": "layers", "done": 1,' in line for line in process.stderr)
        process.terminate()
        assert "Traceback" not in process.communicate()[1]
    assert (process.returncode, [path.name for path in tmp_path.iterdir()]) == (128 + signal.SIGTERM, [".out.unfinished"])
    quantize(SOURCE, recipe=GPTQ, output=tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed["gptq"]


def test_finished_layers_are_not_done_again(undisturbed, tmp_path):
    class Stopped(Exception):
        pass

    def stop_after_two(event):
        if (event.stage, event.done) == ("layers", 2):
            raise Stopped

    with pytest.raises(Stopped):
        quantize(SOURCE, recipe=GPTQ, output=tmp_path / "out", report=stop_after_two)
    assert sorted(path.name for path in (tmp_path / ".out.unfinished").glob("layer-*")) == [
        f"layer-{index:05}.safetensors" for index in range(2)
    ]
    events: list[Event] = []
    quantize(SOURCE, recipe=GPTQ, output=tmp_path / "out", report=events.append)
    assert [event.done for event in events if event.stage == "layers"] == [2, 3]
    assert "going on after layer 2 of 3" in [event.message for event in events]
    assert not [event for event in events if event.stage == "calibration" and event.total]
    assert contents(tmp_path / "out") == undisturbed["gptq"]


@pytest.mark.parametrize("limit", [1000, 300_000, 600_000])
def test_a_full_disk_is_one_sentence_and_costs_no_finished_layer(limit, undisturbed, tmp_path):
    process = start(GPTQ, tmp_path / "out", limit)
    out, errors = process.communicate()
    refused = [line for line in out.splitlines() if line.startswith("refused:")]
    assert len(refused) == 1 and "no space left" in refused[0], errors
    finished = len(list(tmp_path.glob(".out.unfinished/layer-*.safetensors")))
    assert ("goes on after layer" in refused[0]) == bool(finished)
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"] * ("goes on" in refused[0])
    quantize(SOURCE, recipe=GPTQ, output=tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed["gptq"]


def interrupted(output, settings):
    """A run that was stopped after its first layer."""
    with pytest.raises(KeyboardInterrupt), resuming(output, settings, overwrite=False) as run:
        run.keep(0, QuantizedLayer({}, []))
        raise KeyboardInterrupt


def test_other_settings_do_not_go_on(tmp_path):
    output = tmp_path / "out"
    interrupted(output, {"recipe": {"bits": 4}, "threads": 2})
    with pytest.raises(OutputRefused, match="recipe bits 4, now 8; repeat that command"), resuming(output, {"recipe": {"bits": 8}, "threads": 2}, overwrite=False):
        pass
    with resuming(output, {"recipe": {"bits": 4}, "threads": 2}, overwrite=False) as run:
        assert run.layers == 1
    assert list(tmp_path.iterdir()) == []
    interrupted(output, {"recipe": {"bits": 4}, "threads": 2})
    with resuming(output, {"recipe": {"bits": 8}, "threads": 2}, overwrite=True) as run:
        assert run.layers == 0


def test_two_at_once_are_refused(tmp_path):
    with resuming(tmp_path / "out", {}, overwrite=False):
        with pytest.raises(OutputRefused, match="another vlquant"), resuming(tmp_path / "out", {}, overwrite=False):
            pass
        assert (tmp_path / ".out.unfinished").is_dir()


def test_a_bundle_that_cannot_be_read_back_is_not_published(tmp_path, monkeypatch):
    import vlquant.quantize
    from vlquant.errors import VlquantError
    from vlquant.reload import reload, reload_elsewhere

    def spoil(folder: Path):
        (folder / "config.json").write_text("{")
        manifest = json.loads((folder / "vlquant.json").read_text())
        (folder / "vlquant.json").write_text(json.dumps({**manifest, "source_config": {}}))
        reload_elsewhere(folder)

    monkeypatch.setattr(vlquant.quantize, "reload_elsewhere", spoil)
    with pytest.raises(VlquantError, match="cannot be read back"):
        quantize(SOURCE, recipe=RECIPES["bnb"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(vlquant.quantize, "reload_elsewhere", reload_elsewhere)
    folder = quantize(SOURCE, recipe=RECIPES["bnb"], output=tmp_path / "out")
    assert reload(folder)


def test_differences_are_named():
    assert difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}) == "b c 2, now 3"


def test_what_is_left_after_a_bundle_is_whole_goes_when_the_command_is_repeated(tmp_path):
    """As after a kill between the last rename and the clean-up."""
    output = quantize(SOURCE, recipe=RECIPES["rtn"], output=tmp_path / "out")
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / "layer-00000.safetensors").write_bytes(b"x")
    quantize(SOURCE, recipe=RECIPES["rtn"], output=output)
    assert not left.exists()


def test_encoded_conversations_are_kept_and_nothing_is_not_refused(tmp_path):
    """An interrupted run with other settings stands in the way only if it has something."""
    from vlquant.calibrate import CLASSES_FILE

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), resuming(output, {"a": 1}, overwrite=False) as run:
        (run.folder / CLASSES_FILE).write_text("[]")
        raise KeyboardInterrupt
    with pytest.raises(OutputRefused, match="a 1, now 2"), resuming(output, {"a": 2}, overwrite=False):
        pass
    assert (tmp_path / ".out.unfinished" / CLASSES_FILE).exists()
    (tmp_path / ".out.unfinished" / CLASSES_FILE).unlink()
    with resuming(output, {"a": 2}, overwrite=False) as run:
        assert run.layers == 0


def test_space_already_taken_by_the_same_run_is_not_asked_for_again(tmp_path):
    from vlquant.unfinished import bytes_so_far

    assert bytes_so_far(tmp_path / "out") == 0
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "layer-00000.safetensors").write_bytes(b"x" * 100)
    assert bytes_so_far(tmp_path / "out") == 100
