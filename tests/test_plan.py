"""What fits is told from headers alone, and what is told to fit does, to the last token and tile."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from rich.console import Console
from typer.testing import CliRunner

from vlquant import members, plan_table
from vlquant.calib_data import demo_model
from vlquant.cli import app
from vlquant.config import parse_config
from vlquant.errors import BrokenCheckpoint, InvalidRequest, UnsupportedCheckpoint
from vlquant.layout import EMBEDDING, HEAD, language_shapes
from vlquant.members import MEMBERS, member_config
from vlquant.memory import FORMS, HALF, PLACES, TEXT_TOKENS, Form, running_place
from vlquant.plan import GPU_BYTES, choose, from_json, largest, parse_bytes, plan, published_weights, stored_weights, to_json
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime import load
from vlquant.runtime.native import NativeLinear, native_kernels
from vlquant.runtime.native_decoder import NativeDecoder
from vlquant.runtime.reader import position_limit
from vlquant.synthesize import synthesize

from tests.narrow_members import narrow


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    from huggingface_hub import HfApi

    def unreachable(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(HfApi, "file_exists", unreachable)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The demo model, rounded to 4 and 8 bits and by bitsandbytes."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {recipe.label: recipe for recipe in (Recipe(*each) for each in (("rtn", 3), ("rtn", 4), ("rtn", 8), ("bnb", 4), ("bnb", 8)))}
    made["head of 16 bits"] = Recipe("rtn", 4, head_bits=16)
    return {label: quantize(demo_model(), recipe=recipe, output=folder / label) for label, recipe in made.items()}


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], prog_name="vlquant")


def test_8b_fits_a_1080_ti_in_four_bits_and_26b_does_not():
    fits = {(choice.method, choice.vision): choice.fits for choice in plan("InternVL2_5-8B").choices}
    assert fits[("GPTQ-4", "fp16")] and fits[("GPTQ-4", "fp32")] and fits[("NF4", "fp32")]
    assert not fits[("float16", "fp16")] and not fits[("int8", "fp16")]
    assert not plan("InternVL2_5-26B").fits and not plan("InternVL2_5-26B", context=TEXT_TOKENS, tiles=0).fits


def test_every_method_is_planned_in_every_precision_of_the_device():
    for device, place in PLACES.items():
        found = plan("InternVL2_5-1B", device=device, memory=GPU_BYTES)
        pairs = [(choice.method, choice.vision) for choice in found.choices]
        assert pairs == [(method, vision) for method in ("float16", *FORMS) for vision in place.visions]
        assert all(choice.total == choice.memory.total and choice.fits == (choice.total <= GPU_BYTES) for choice in found.choices)


@settings(deadline=None, max_examples=30)
@given(
    name=some.sampled_from(["InternVL2_5-1B", "InternVL2_5-8B", "InternVL2-4B", "InternVL2_5-26B", "InternVL2-40B"]),
    form=some.sampled_from([HALF, *FORMS.values()]),
    device=some.sampled_from(sorted(PLACES)),
    limit=some.integers(10**9, 40 * 10**9),
    tiles=some.integers(0, 12),
)
def test_what_is_told_to_fit_does_and_one_more_does_not(name, form, device, limit, tiles):
    weights = published_weights(name)
    weights = replace(weights, linears=dict.fromkeys(weights.linears, form))
    place = running_place(PLACES[device], weights)

    def choice(context, tiles):
        return choose(weights, place, limit, method="x", vision="fp32", size=(context, tiles))

    least = TEXT_TOKENS + 256 * tiles
    found, most = choice(least, tiles), position_limit(weights.config.decoder)
    assert found.fits == (found.total <= limit) == (found.largest_context is not None)
    if found.largest_context is not None:
        assert choice(found.largest_context, tiles).fits and found.largest_context <= most
        assert found.largest_context == most or not choice(found.largest_context + 1, tiles).fits
    if found.most_tiles is not None:
        tokens = TEXT_TOKENS + 256 * found.most_tiles
        assert choice(tokens, found.most_tiles).fits and tokens <= most
        assert tokens + 256 > most or not choice(tokens + 256, found.most_tiles + 1).fits
    else:
        assert not choice(TEXT_TOKENS, 0).fits


@given(some.integers(-5, 40), some.integers(0, 30), some.integers(0, 60))
def test_the_largest_number_that_fits(low, span, bound):
    expected = max((each for each in range(low, low + span + 1) if each <= bound), default=None)
    assert largest(lambda number: number <= bound, low, low + span) == expected


def test_a_plan_survives_json():
    for found in (plan("InternVL2_5-8B"), plan(demo_model(), device="cpu", memory=10**9), plan("InternVL2_5-26B", tiles=0)):
        assert from_json(to_json(found)) == found


@pytest.mark.parametrize("name", ["InternVL2_5-8B", "InternVL2-4B", "InternVL3_5-1B"])
def test_headers_are_enough(name, tmp_path, monkeypatch):
    """Weights that are cut off, or a hole on the disk, are planned as whole ones are."""
    monkeypatch.setitem(members.MEMBERS, name, narrow(name))
    folder = synthesize(name, tmp_path / "model")
    whole = plan(folder)
    weights = folder / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    size = weights.stat().st_size
    os.truncate(weights, header)
    assert plan(folder) == whole
    os.truncate(weights, size)  # A hole of zeros instead of the tensors.
    assert plan(folder) == whole
    os.truncate(weights, header - 10)
    with pytest.raises(BrokenCheckpoint, match="truncated"):
        plan(folder)


@pytest.mark.parametrize("name", ["InternVL2_5-8B", "InternVL2-4B", "InternVL3_5-1B", "InternVL2_5-1B"])
def test_a_checkpoint_is_planned_as_its_published_shape(name, tmp_path, monkeypatch):
    monkeypatch.setitem(members.MEMBERS, name, narrow(name))
    assert plan(synthesize(name, tmp_path / "model")).choices == plan(name).choices


def test_headers_that_contradict_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setitem(members.MEMBERS, "InternVL2_5-8B", narrow("InternVL2_5-8B"))
    folder = synthesize("InternVL2_5-8B", tmp_path / "model")
    source = json.loads((folder / "config.json").read_text())
    source["llm_config"]["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(source))
    with pytest.raises(BrokenCheckpoint, match="same checkpoint"):
        plan(folder)


def test_a_bundle_is_planned_as_it_is(bundles):
    forms = {"rtn-4bit": "GPTQ-4", "rtn-8bit": "GPTQ-8", "bnb-4bit": "NF4", "bnb-8bit": "int8"}
    planned = {choice.method: choice.memory for choice in plan(demo_model()).choices}
    for label, form in forms.items():
        found = plan(bundles[label])
        assert {choice.method for choice in found.choices} == {label}
        assert found.choices[-1].memory == planned[form]
    assert plan(bundles["rtn-3bit"]).choices[-1].memory == planned["GPTQ-4"]  # On a GPU three bits take the room of four.


def test_each_linear_of_a_bundle_is_told_by_its_own_headers(tmp_path):
    recipe = Recipe(average_bits=5, group_size=64, samples=4)
    weights, label = stored_weights(quantize(demo_model(), recipe=recipe, output=tmp_path / "mixed"))
    assert label == "gptq-5bit"
    assert set(weights.linears.values()) == {Form(4, 64, 2), Form(8, 64, 2)}


LABELS = ("rtn-3bit", "rtn-4bit", "rtn-8bit", "bnb-4bit", "bnb-8bit", "head of 16 bits")


@pytest.mark.parametrize("label", LABELS)
def test_the_running_decoder_holds_what_is_planned(bundles, label):
    require_what_is_planned(bundles[label], compiled=native_kernels() is not None and label not in ("rtn-3bit", "bnb-4bit"))


@pytest.mark.parametrize("label", LABELS)
def test_without_kernels_it_holds_what_is_planned_too(bundles, label, torch_kernels):
    require_what_is_planned(bundles[label], compiled=False)
    [remark] = plan(bundles[label], device="cpu").remarks
    assert "without compiled kernels" in remark and plan(bundles[label], device="cuda").remarks == ()


@pytest.mark.parametrize("settings", [{"sym": False}, {"desc_act": True}])
def test_what_other_programs_wrote_is_not_planned_for_the_kernels(bundles, settings, tmp_path, monkeypatch):
    """Told by config.json alone: an offset for each group, or the place of each column, and torch's products."""
    monkeypatch.setattr("vlquant.plan.native_kernels", lambda: "are here")
    shutil.copytree(bundles["rtn-4bit"], tmp_path / "foreign")
    path = tmp_path / "foreign" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))
    memory, ours = (plan(each, device="cpu").choices[0].memory for each in (tmp_path / "foreign", bundles["rtn-4bit"]))
    assert memory.linears > ours.linears and memory.embedding > 0 and memory.work > ours.work


def require_what_is_planned(bundle, *, compiled):
    """The tensors of our own runtime on a CPU, byte for byte; the forms of memory.py are adjusted with them."""
    decoder = load(bundle, vision="torch").decoder
    memory = plan(bundle, device="cpu", memory=10**9).choices[0].memory
    assert isinstance(decoder, NativeDecoder) == compiled
    layers = decoder._layers if compiled else decoder.layers
    linears = [linear for layer in layers for linear in layer.linears.values()]
    tables = sum(linear.pairs.nbytes for linear in linears if hasattr(linear, "pairs"))  # NF4's 256 pairs of values
    held = sum(tensor_bytes(linear) for linear in linears) - tables
    held += sum(norm.nbytes for layer in layers for norm in layer.norms.values()) + decoder.norm.nbytes
    assert held == memory.linears
    embedding = 0 if compiled else decoder.embedding.nbytes
    assert embedding == memory.embedding
    rounded = isinstance(decoder.head, NativeLinear)
    head, row = tensor_bytes(decoder.head.matrix if rounded else decoder.head), memory.head // decoder.config.vocab_size
    assert 0 <= head - memory.head < (16 * row if rounded else 1)  # Rows are filled up to sixteens.


def tensor_bytes(linear) -> int:
    return sum(value.nbytes for value in vars(linear).values() if hasattr(value, "nbytes"))


def test_a_bundle_is_called_by_its_folder_wherever_it_is_named_from(bundles, monkeypatch):
    monkeypatch.chdir(bundles["rtn-4bit"])
    assert plan(".").model == "rtn-4bit"
    assert "rtn-4bit on cuda" in run().stdout  # The bundle here, as for the other verbs.


def test_groups_that_do_not_divide_leave_gptq_out(tmp_path, monkeypatch):
    odd = replace(narrow("InternVL2_5-8B"), hidden_size=64, intermediate_size=96)
    monkeypatch.setitem(members.MEMBERS, "InternVL2_5-8B", odd)
    found = plan("InternVL2_5-8B")
    assert {choice.method for choice in found.choices} == {"float16", "NF4", "int8"}
    assert [remark for remark in found.remarks if remark.startswith("GPTQ-4 in groups of 128 is not possible")]


def test_defaults_are_what_the_model_can_read():
    found = plan("InternVL2-40B")  # 4096 positions
    assert (found.context, found.tiles, found.position_limit) == (4096, 13, 4096)
    assert (plan("InternVL2_5-8B").context, plan("InternVL2_5-8B").tiles) == (8192, 13)
    assert plan("InternVL2_5-8B", context=2048).tiles == (2048 - TEXT_TOKENS) // 256
    assert plan(demo_model(), device="cpu").limit > 10**8


@pytest.mark.parametrize(
    ("text", "expected"),
    [("11GB", 11e9), ("11", 11e9), ("11 GB", 11e9), ("11gib", 11 * 2**30), ("10.5GiB", 10.5 * 2**30), ("8000MB", 8e9), ("512MiB", 2**29), ("11G", 11e9)],
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "eleven", "-11GB", "0", "nan", "inf", "1e400", "11TB", "11GBGB", "11 potatoes", "1_1GB x"])
def test_nonsense_is_refused_in_one_sentence(text):
    with pytest.raises(InvalidRequest, match="no amount of memory; write it like"):
        parse_bytes(text)
    done = run("InternVL2_5-8B", f"--vram={text}")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tiles", 32), "--tiles 0 to 30"),
        (("--tiles", -1), "--tiles is -1, and a conversation has none or more; use --tiles 0 to 30\n"),
        (("--context", 10**6), "--context 512 to 65536"),
        (("--context", 0), "--context 512"),
        (("--device", "tpu"), "cpu or cuda"),
        (("--context", 1024, "--tiles", 13), "13 tiles of 256 tokens and 512 for question and answer take 3840 tokens of 1024; use --tiles 0 to 2, or --context 3840\n"),
        (("--context", 512, "--tiles", 1), "1 tile of 256 tokens and 512 for question and answer take 768 tokens of 512; use --tiles 0, or --context 768\n"),
        (("--context", 512, "--tiles", 300), "take 77312 tokens of 512; use --tiles 0\n"),
    ],
)
def test_what_cannot_be_planned(options, said):
    done = run("InternVL2_5-8B", *options)
    assert done.exit_code == 2 and said in done.stderr and done.stdout == ""


@pytest.mark.parametrize(("name", "error"), [("InternVL9-8B", UnsupportedCheckpoint), ("./nowhere", BrokenCheckpoint), ("a/b/c", BrokenCheckpoint)])
def test_names_that_mean_nothing(name, error):
    with pytest.raises(error):
        plan(name)


def test_the_command_prints_a_table_of_eighty_columns():
    done = run("InternVL2_5-8B", "--vram", "11GB", "--context", 8192, "--tiles", 13)
    assert done.exit_code == 0 and "asking the hub" in done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("GPTQ-4  fp16"))
    assert row.split()[2] == "3.60" and "yes" in row
    assert "7.5" not in done.stdout and "published shapes" in done.stdout  # int8 runs by our own kernels, on a GTX 1080 Ti too.


def test_sizes_of_a_small_model_are_told_in_megabytes():
    lines = run(demo_model(), "--device", "cpu", "--memory", "9GB", "--tiles", 1).stdout.splitlines()
    row, memory = lines[2].split(), plan(demo_model(), device="cpu", memory=9 * 10**9, tiles=1).choices[0].memory
    assert row[:3] == ["float16", "fp32", f"{memory.linears / 1e6:.2f}"] and row[9] == f"{memory.total / 1e6:.1f}"
    assert max(map(len, lines)) <= 80 and any(line.startswith("MB of 10^6 bytes") for line in lines) and "1 tile in it" in lines[0]
    assert "GB of 10^9 bytes" in run("InternVL2_5-1B").stdout


def test_a_narrow_terminal_loses_no_numbers():
    wide, narrow = (CliRunner(env={"COLUMNS": width}).invoke(app, ["plan", "InternVL2_5-8B"]).stdout for width in ("80", "40"))
    assert narrow == wide and "GPTQ-4" in narrow


def test_the_largest_published_model_fits_the_table_too():
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    plan_table.print_plan(plan("InternVL2_5-78B", memory=200 * 10**9), console)
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_exit_codes_tell_whether_anything_fits():
    assert run("InternVL2_5-8B").exit_code == 0
    done = run("InternVL2_5-26B", "--vram", "11GB")
    assert done.exit_code == 3 and "nothing fits" in done.stdout


@pytest.mark.parametrize(("size", "way_out"), [("8GB", r"a --context of (?P<context>\d+) would"), ("7GB", r"--tiles (?P<tiles>\d+) --context (?P<context>\d+) would")])
def test_what_would_fit_instead_does(size, way_out):
    done = run("InternVL2_5-8B", "--vram", size)
    options = re.search(f"nothing fits; {way_out}", done.stdout).groupdict()
    assert done.exit_code == 3
    assert run("InternVL2_5-8B", "--vram", size, *(f"--{name}={value}" for name, value in options.items())).exit_code == 0


def test_json_is_one_line_for_programs():
    done = run("InternVL2_5-8B", "--json", "--memory", "9GB")
    assert done.exit_code == 0 and done.stdout.count("\n") == 1
    told = json.loads(done.stdout)
    assert told["fits"] is True and told["limit"] == 9 * 10**9 and told["choices"][0]["total"] > 9e9
    assert from_json(done.stdout) == plan("InternVL2_5-8B", memory=9 * 10**9)
    assert json.loads(run("InternVL2_5-26B", "--json").stdout)["fits"] is False


def test_shapes_of_the_published_are_those_of_their_configuration():
    weights = published_weights("InternVL2_5-1B")
    shapes = language_shapes(parse_config(member_config(MEMBERS["InternVL2_5-1B"]), "x").decoder)
    assert set(shapes) - set(weights.linears) >= {EMBEDDING, HEAD} and len(weights.linears) == 7 * 24


def test_a_known_name_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    """Local folders win, as everywhere."""
    monkeypatch.setitem(members.MEMBERS, "InternVL2_5-8B", narrow("InternVL2_5-8B"))
    synthesize("InternVL2_5-8B", tmp_path / "InternVL2_5-1B")
    monkeypatch.chdir(tmp_path)
    found = plan("InternVL2_5-1B")
    assert found.choices[0].memory.linears < 10**7 and not any("published shapes" in remark for remark in found.remarks)
