"""`vlquant bench`: runs on the demo model, its arithmetic, its JSON, and what it refuses."""

import ast
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vlquant import bench as bench_module
from vlquant import contestants
from vlquant.bench import Task, bench, tasks_for, turns
from vlquant.bench_options import MEASURES, BenchOptions, kept_model, row_lengths
from vlquant.bench_result import to_json
from vlquant.bench_shape import bundle_of_shape
from vlquant.bench_table import remarks
from vlquant.calib_data import demo_model
from vlquant.cli import app
from vlquant.config import parse_config, read_config
from vlquant.contestants import CONTESTANTS, Contestant, ContestantProcess, choose_peers
from vlquant.errors import BrokenCheckpoint, InvalidRequest, MissingDependency
from vlquant.export.vision import export_vision
from vlquant.layout import tensor_shapes
from vlquant.machine import this_machine
from vlquant.members import MEMBERS, member_config
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime.native import native_kernels

from tests.made_up_bench import MACHINE, SMALL, made_up


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = quantize(demo_model(), recipe=Recipe(method="rtn", bits=4), output=tmp_path_factory.mktemp("bench") / "demo")
    export_vision(folder)
    return folder


@pytest.fixture(scope="module")
def measured(bundle, tmp_path_factory):
    return bench(bundle, tmp_path_factory.mktemp("work"), options=SMALL)


def test_it_measures_everything_on_the_demo_model(measured):
    ours = {each.measure: each.values for each in measured.series if each.contestant == "vlquant"}
    assert list(ours) == [
        "process start with imports", "load", "load to first token of a text", "peak memory, text answered",
        "peak memory, picture answered", "tile, float32", "first token, one tile", "prefill 24", "decode after 16",
        "decode 2 side by side after 16",
    ]  # fmt: skip
    assert all(len(each.values) == SMALL.rounds and min(each.values) > 0 for each in measured.series)
    assert all(text > load for load, text in zip(ours["load"], ours["load to first token of a text"], strict=True))
    assert 5e7 < ours["peak memory, text answered"][0] <= 5e9
    ours = measured.contestants["vlquant"]
    assert ours["load_seconds"] > 0 and 0 < ours["text_tokens"] < ours["picture_tokens"]


def test_peers_are_measured_where_they_can(measured):
    assert measured.not_measured == {}
    by_peer = {name: {each.measure for each in measured.series if each.contestant == name} for name in ("torch", "transformers")}
    assert by_peer["torch"] == {"tile, float32"}
    assert by_peer["transformers"] == {
        "tile, float32", "first token, one tile", "prefill 24", "decode after 16", "decode 2 side by side after 16"
    }  # fmt: skip


def test_a_result_is_json_with_medians_and_ratios(measured):
    told = json.loads(to_json(measured))
    assert told["format_version"] == 1 and told["machine"]["threads"] >= 1
    assert {"model", "shape", "date", "options", "machine", "contestants", "series", "not_measured"} <= set(told)
    for each in told["series"]:
        assert each["first_quartile"] <= each["median"] <= each["third_quartile"]
        assert (each["ours_to_this"] is None) == (each["contestant"] == "vlquant")


def test_every_series_says_which_tower_ran(measured):
    """Ours runs each exported one, and the others their own."""
    towers = {(each["measure"], each["contestant"]): each["tower"] for each in json.loads(to_json(measured))["series"] if each["tower"]}
    by_all = {(measure, name): "float32" for measure in ("tile, float32", "first token, one tile") for name in ("vlquant", "transformers")}
    assert towers == by_all | {("tile, float32", "torch"): "float32", ("peak memory, picture answered", "vlquant"): "float32"}
    rounds = bench_module.Rounds()
    rounds.learn("vlquant", {"vision": "onnx int8", "picture_tokens": 9})
    running = dict.fromkeys(("vlquant", "torch", "transformers", "openvino"), (None, {"vision", "picture"}))
    for task in (Task("vision", "tile", "vision", {}, tower="float16"), Task("picture", "picture", "picture", {})):
        bench_module.measure_task(task, running, SimpleNamespace(rounds=-1), rounds, lambda event: None)
    assert {name: rounds.towers["tile", name] for name in running} == {
        "vlquant": "float16", "torch": "float32", "transformers": "float32", "openvino": "float16 file"
    }  # fmt: skip
    assert (rounds.towers["picture", "vlquant"], rounds.towers["picture", "transformers"]) == ("int8", "float32")


def test_contestants_take_turns_after_a_warm_up():
    names = ["ours", "peer"]
    assert list(turns(names, 2, "decode", lambda event: None)) == [(n, name) for n in (0, 1, 2) for name in names]


def test_speeds_are_tokens_by_seconds():
    assert Task("prefill", "", "prefill", {}, 512).value(2.0) == 256
    assert Task("vision", "", "vision", {}).value(2.0) == 2.0


def test_conversations_side_by_side_differ_in_length():
    assert row_lengths(512, 1) == [512]
    assert row_lengths(512, 5) == [512, 448, 384, 320, 256]


def test_this_machine_is_described():
    machine = this_machine(2)
    assert machine.processor and machine.cores >= 1 and machine.threads == 2
    assert {"vlquant", "python", "torch"} <= set(machine.libraries)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"measures": ()}, "nothing to measure"),
        ({"measures": ("speed",)}, "'speed' is not known"),
        ({"kernels": ("sse",)}, "'sse' is not known"),
        ({"rounds": 0}, "1 or more"),
        ({"prompts": ()}, "at least one"),
    ],
)
def test_options_that_measure_nothing_are_refused(settings, words):
    with pytest.raises(InvalidRequest, match=words):
        BenchOptions(**settings)


def test_more_positions_than_the_model_has_are_refused(bundle, tmp_path):
    with pytest.raises(InvalidRequest, match="lower --prompts"):
        bench(bundle, tmp_path, options=replace(SMALL, prompts=(100_000,)))
    assert BenchOptions(measures=("vision",), prompts=(100_000,)).longest == 1


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="no bundle"):
        bench(demo_model(), tmp_path, options=SMALL)


def test_vision_without_a_tower_is_nothing_to_measure(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "towers_of", lambda folder: {})
    assert {each.measure for each in tasks_for(bundle, SMALL)} == {"prefill", "decode", "batch"}
    with pytest.raises(InvalidRequest, match="nothing to measure.*export-vision"):
        bench(bundle, tmp_path, options=replace(SMALL, measures=("vision", "picture")))
    found = bench(bundle, tmp_path, options=replace(SMALL, measures=("vision", "decode"), against=(), rounds=1))
    assert list(found.not_measured) == ["vision"] and "vlquant export-vision" in found.not_measured["vision"]
    with pytest.raises(InvalidRequest, match="torch cannot be measured: .* no exported vision tower"):
        bench(bundle, tmp_path, options=replace(SMALL, measures=("vision", "decode"), against=("torch",)))


def test_a_peer_that_shares_no_measure_is_named(bundle, tmp_path, monkeypatch):
    only_decode = replace(SMALL, measures=("decode",), rounds=1)
    with pytest.raises(InvalidRequest, match="torch cannot be measured: of decode it measures none, only vision; leave it out"):
        bench(bundle, tmp_path, options=replace(only_decode, against=("torch",)))
    monkeypatch.setattr(bench_module, "choose_peers", lambda wanted, config: (["torch"], {}))
    found = bench(bundle, tmp_path, options=replace(only_decode, against=None))
    assert found.not_measured == {"torch": "of decode it measures none, only vision"}
    assert {each.contestant for each in found.series} == {"vlquant"}


@pytest.mark.parametrize("kernels", ["torch", *(["avx2"] if native_kernels() else [])])
def test_other_kernels_of_ours_are_entrants_of_their_own(kernels, bundle, tmp_path):
    found = bench(bundle, tmp_path, options=replace(SMALL, measures=("decode", "vision"), against=(), kernels=(kernels,), rounds=1))
    entrant = f"vlquant, {kernels} kernels"
    assert found.contestants[entrant]["decoder"] == {"torch": "torch", "avx2": "kernels for AVX2"}[kernels]
    measures = {each.measure for each in found.series if each.contestant == entrant}
    assert measures == {"decode after 16"} and found.ratio(found.find("decode after 16", entrant)) > 0  # Towers have none of them.


@pytest.mark.parametrize("measure", ["picture", "start"])
def test_kernels_of_ours_that_share_no_measure_are_named(measure, bundle, tmp_path):
    found = bench(bundle, tmp_path, options=replace(SMALL, measures=(measure,), against=(), kernels=("torch", "avx2"), rounds=1))
    assert found.not_measured == {
        f"vlquant, {each} kernels": f"of {measure} it measures none, only batch, decode, prefill" for each in ("torch", "avx2")
    }
    assert set(found.contestants) == {"vlquant"}


def test_a_float_model_that_memory_has_no_room_for_is_left_out(monkeypatch):
    config = read_config(demo_model())
    find = importlib.util.find_spec
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: find("json") if name == "transformers" else find(name))
    parameters = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    monkeypatch.setattr(contestants, "available_memory", lambda: 4 * parameters)
    assert choose_peers(("transformers",), config) == (["transformers"], {})
    monkeypatch.setattr(contestants, "available_memory", lambda: 4 * parameters - 1)
    with pytest.raises(InvalidRequest, match="transformers cannot run this model: its weights in float32 take 0.0 GB, and 0.0 GB of memory are free"):
        choose_peers(("transformers",), config)
    assert "in float32" in choose_peers(None, config)[1]["transformers"]


def test_what_peers_are_made_with_tells_their_models_apart(tmp_path):
    settings = {"work": str(tmp_path), "shape": "abc"}
    one = kept_model(settings, "a-peer", version="1", block_size="128")
    assert one == kept_model(settings, "a-peer", block_size="128", version="1") and one.parent == tmp_path
    others = [
        kept_model(settings, "a-peer", version="2", block_size="128"), kept_model(settings, "a-peer", version="1", block_size="32"),
        kept_model({**settings, "shape": "abd"}, "a-peer", version="1", block_size="128"),
    ]  # fmt: skip
    assert len({one, *others}) == 4 and all(each.name.startswith("a-peer-") for each in others)


def test_a_busy_machine_is_warned_of(bundle, tmp_path):
    heard = []
    busy = replace(MACHINE, load_average=1.1)
    options = replace(SMALL, measures=("decode",), against=(), rounds=1)
    found = bench(bundle, tmp_path, options=options, machine=busy, report=heard.append)
    assert any("load average being 1.1" in (event.message or "") for event in heard) and found.machine == busy
    assert busy.is_busy and not MACHINE.is_busy and not replace(MACHINE, load_average=None).is_busy
    assert "load average before: 1.1, so that this is worth little" in "".join(remarks(made_up(machine=busy)))


def test_what_is_named_twice_is_measured_once():
    options = BenchOptions(contexts=(16, 16, 32), prompts=(24, 24), kernels=("torch", "torch"))
    assert (options.contexts, options.prompts, options.kernels) == ((16, 32), (24,), ("torch",))


def test_an_unknown_shape_names_the_nearest(tmp_path):
    with pytest.raises(InvalidRequest, match="InternVL2_5-1B"):
        bundle_of_shape("InternVL2_5-1b", tmp_path)
    done = CliRunner().invoke(app, ["bench", "--shape", "InternVL2_5-1b", "--keep", str(tmp_path)])
    assert done.exit_code == 2 and "not known" in done.output and list(tmp_path.iterdir()) == []


def test_absent_peers_are_refused_by_name_or_left_out(monkeypatch):
    config = read_config(demo_model())
    find = importlib.util.find_spec
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: None if name in ("gguf", "openvino") else find(name))
    with pytest.raises(MissingDependency, match="llama-cpp .*gguf.*pip install llama-cpp-python gguf"):
        choose_peers(("llama-cpp",), config)
    with pytest.raises(InvalidRequest, match="there is no peer 'ollama'"):
        choose_peers(("ollama",), config)
    with pytest.raises(MissingDependency, match="openvino cannot be measured.* llama-cpp cannot be measured.*gguf$"):
        choose_peers(("openvino", "torch", "llama-cpp", "openvino"), config)
    chosen, reasons = choose_peers(None, config)
    assert "torch" in chosen and not {"llama-cpp", "openvino"} & set(chosen)
    assert "pip install openvino" in reasons["openvino"]
    assert choose_peers((), config) == ([], {})


def test_peers_that_cannot_run_the_architecture_are_refused(monkeypatch):
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: name)
    phi3 = parse_config(member_config(MEMBERS["InternVL2-4B"]), "InternVL2-4B")
    for name in ("llama-cpp", "onnxruntime-genai"):
        with pytest.raises(InvalidRequest, match=f"{name} cannot run this model: bench writes no Phi-3"):
            choose_peers((name,), phi3)
    narrow = read_config(demo_model())
    narrow = replace(narrow, decoder=replace(narrow.decoder, intermediate_size=760))
    with pytest.raises(InvalidRequest, match="multiples of 32"):
        choose_peers(("llama-cpp",), narrow)


def test_a_peer_that_fails_is_left_out_and_named(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(CONTESTANTS, "torch", Contestant("json", frozenset({"decode"})))
    options = replace(SMALL, measures=("decode",), against=("torch",), rounds=1)
    found = bench(bundle, tmp_path, options=options)
    assert "open_contestant" in found.not_measured["torch"]
    assert [each.contestant for each in found.series] == ["vlquant"]


def test_ours_failing_ends_it(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(CONTESTANTS, "vlquant", Contestant("json", frozenset(MEASURES)))
    with pytest.raises(BrokenCheckpoint, match="the process that ran vlquant ended .*open_contestant"):
        bench(bundle, tmp_path, options=replace(SMALL, measures=("decode",), against=()))


def test_a_process_that_was_killed_is_told_of():
    with ContestantProcess("a peer", "json", {"threads": 1}) as process:
        process._process.kill()
        process._process.wait()
        with pytest.raises(BrokenCheckpoint, match="a peer ended .it was killed, probably for want of memory"):
            process.ask("load")


def test_the_command_hands_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bench_module, "bench", lambda *arguments, **options: calls.append((arguments, options)) or made_up())
    plot = tmp_path / "bench.png"
    options = ["--against", "none", "--measure", "decode,batch", "--kernels", "avx2", "--contexts", "16,32", "--rounds", "1", "--json"]
    done = CliRunner().invoke(app, ["bench", "a-bundle", *options, "--plot", str(plot)])
    assert done.exit_code == 0 and json.loads(done.stdout)["model"] == "a-bundle" and plot.is_file()
    [((bundle, _), found)] = calls
    asked = BenchOptions(measures=("decode", "batch"), against=(), kernels=("avx2",), contexts=(16, 32), rounds=1)
    assert (bundle, found["options"]) == ("a-bundle", asked)
    for wrong in (["--prompts", "many"], ["--against", ","], ["--against", ""]):
        done = CliRunner().invoke(app, ["bench", "a-bundle", *wrong])
        assert done.exit_code == 2 and wrong[0] in done.output and len(calls) == 1


@pytest.mark.parametrize("module", ["contestant", "bench_options", "peer_llama_cpp", "peer_onnxruntime_genai", "peer_openvino"])
def test_the_memory_of_peers_holds_nothing_large_of_ours(module):
    tree = ast.parse((Path(contestants.__file__).parent / f"{module}.py").read_text())
    ours = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.startswith("vlquant")}
    assert ours <= {"vlquant.bench_options", "vlquant.ending", "vlquant.errors", "vlquant.machine"}


@pytest.mark.interop
def test_a_gguf_file_has_the_shape(bundle, tmp_path):
    gguf = pytest.importorskip("gguf")
    from vlquant.gguf_shape import write_gguf

    write_gguf(tmp_path / "model.gguf", read_config(bundle))
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    decoder = read_config(bundle).decoder
    assert len(tensors) == 3 + 9 * decoder.layers
    down, head = tensors["blk.0.ffn_down.weight"], tensors["output.weight"]
    assert (down.tensor_type.name, list(down.shape)) == ("Q4_0", [decoder.intermediate_size, decoder.hidden_size])
    assert (head.tensor_type.name, list(head.shape)) == ("Q8_0", [decoder.hidden_size, decoder.vocab_size])


@pytest.mark.interop
@pytest.mark.parametrize("name", ["llama-cpp", "onnxruntime-genai", "openvino"])
def test_installed_peers_are_measured(name, bundle, tmp_path):
    for library in CONTESTANTS[name].libraries:
        pytest.importorskip(library)
    found = bench(bundle, tmp_path, options=replace(SMALL, against=(name,), rounds=1))
    assert found.not_measured == {}
    assert sum(each.contestant == name for each in found.series) >= (1 if name == "openvino" else 6)
