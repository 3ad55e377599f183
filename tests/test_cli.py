"""The command line: options reach the verbs, errors are one line, codes are kept. The verbs are stand-ins here."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

import vlquant
from vlquant.check_options import CheckOptions
from vlquant.cli import app
from vlquant.errors import BrokenCheckpoint
from vlquant.recipe import Recipe

ROOT = Path(__file__).parents[1]
COMMANDS = ["quantize", "export-vision", "check", "chat", "demo", "bisect", "compare", "bench", "plan", "prompt", "tiles", "trace", "synthesize", "inspect", "doctor"]


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces a verb; returns the list of calls it got, as (positional, keyword) arguments."""

    def replace(module, verb, result=None, error=None):
        calls = []

        def act(*positional, **keywords):
            calls.append((positional, keywords))
            if error is not None:
                raise error
            return result

        fake = ModuleType(module)
        setattr(fake, verb, act)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return replace


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input, prog_name="vlquant")


def test_version():
    assert run("--version").stdout == f"vlquant {vlquant.__version__}\n"


def test_help_lists_the_commands_in_the_order_of_use():
    lines = run("--help").stdout
    places = [lines.index(f"│ {command} ") for command in COMMANDS]
    assert places == sorted(places)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "InternVL2_5-1B"]])
def test_a_full_disk_behind_standard_output_is_one_sentence(arguments):
    with open("/dev/full", "w") as full:
        done = started(arguments, stdout=full)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: standard output, or a file that was written, met a full disk;")


@pytest.mark.skipif(os.name == "nt", reason="streams are closed otherwise there")
@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_is_an_empty_one(closed):
    done = started(["inspect", "nowhere"], preexec_fn=lambda: os.close(closed))
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert ("nowhere" in done.stderr) == (closed != 2)


def started(arguments, **settings):
    """The command in a process of its own."""
    code = f"import sys\nfrom vlquant.cli import main\nsys.argv = ['vlquant', *{arguments}]\nmain()"
    streams = {name: subprocess.PIPE for name in ("stdout", "stderr")} | settings
    return subprocess.run([sys.executable, "-c", code], text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **streams)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom vlquant.cli import main\n"
        f"sys.argv = ['vlquant', *{arguments}]\n"
        "try:\n    main()\nfinally:\n    print('loaded', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.rpartition("loaded ")[2].split()
    assert "typer" in loaded
    assert not {"torch", "onnxruntime", "onnx", "transformers", "numpy", "PIL", "bitsandbytes"} & set(loaded)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "vlquant", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"vlquant {vlquant.__version__}\n")


def test_quantize_defaults_are_those_of_the_recipe(stand_in):
    calls = stand_in("vlquant.quantize", "quantize", result=Path("bundle"))
    done = run("quantize", "model")
    assert (done.exit_code, done.stdout) == (0, "bundle\n")
    [((source,), keywords)] = calls
    assert source == "model"
    assert keywords["recipe"] == Recipe()
    assert (keywords["output"], keywords["overwrite"]) == (None, False)


def test_quantize_passes_every_option(stand_in):
    calls = stand_in("vlquant.quantize", "quantize", result=Path("out"))
    options = ["--bits", 8, "--group-size", 64, "--samples", 3, "--tokens", 512, "-o", "out", "--overwrite"]
    data = ["--calib", "builtin", "--calib", "a/train.jsonl", "--seed", 4]
    assert run("quantize", *options, *data, "model").exit_code == 0
    [(_, keywords)] = calls
    sets = ("builtin", "a/train.jsonl")
    assert keywords["recipe"] == Recipe(bits=8, group_size=64, calibration=sets, samples=3, tokens=512, seed=4)
    assert (keywords["output"], keywords["overwrite"]) == (Path("out"), True)


def test_quantize_tells_programs_and_the_curious_more(stand_in, monkeypatch):
    import json

    def quantize(source, *, report, **_):
        from vlquant.events import Event

        report(Event("layers", 1, 2, details=("layer 0 mlp.up_proj: error 3 %",)))
        return "bundle"

    stand_in("vlquant.quantize", "quantize")
    monkeypatch.setattr(sys.modules["vlquant.quantize"], "quantize", quantize)
    assert "up_proj" not in run("quantize", "model").stderr
    assert "layer 0 mlp.up_proj: error 3 %" in run("quantize", "-v", "model").stderr
    done = run("quantize", "--json", "model")
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.stdout == "bundle\n" and told[0]["stage"] == "layers" and told[0]["details"] == ["layer 0 mlp.up_proj: error 3 %"]


def test_quantize_without_a_model_says_that_it_takes_the_demo(stand_in):
    calls = stand_in("vlquant.quantize", "quantize", result=Path("bundle"))
    stand_in("vlquant.calib_data", "demo_model", result=Path("demo"))
    done = run("quantize")
    assert calls[0][0] == (Path("demo"),)
    assert "demo model" in done.stderr and done.stdout == "bundle\n"


def test_reports_go_to_standard_error(stand_in, monkeypatch):
    stand_in("vlquant.quantize", "quantize")

    def quantize(source, *, report, **_):
        from vlquant.events import Event

        report(Event("layers", 1, 2))
        report(Event("layers", message="a [remark] that is long enough not to fit into a line of eighty characters at all"))
        return "bundle"

    monkeypatch.setattr(sys.modules["vlquant.quantize"], "quantize", quantize, raising=False)
    done = run("quantize", "model")
    assert done.stdout == "bundle\n"
    assert "a [remark] that is long enough not to fit into a line of eighty characters at all" in done.stderr.splitlines()


def test_export_vision_passes_every_option(stand_in):
    calls = stand_in("vlquant.export.vision", "export_vision", result=Path("out"))
    assert run("export-vision", "bundle", "-o", "out", "--precision", "int8").stdout == "out\n"
    [((source,), keywords)] = calls
    assert source == "bundle" and keywords["output"] == Path("out") and keywords["precision"] == "int8"


def test_the_bundle_here_is_used_and_named(stand_in):
    calls = stand_in("vlquant.export.vision", "export_vision", result=Path("out"))
    stand_in("vlquant.bundle", "find_bundle", result=Path("below"))
    done = run("export-vision")
    assert calls[0][0] == (Path("below"),)
    assert "below" in done.stderr


def test_chat_passes_every_option(stand_in):
    from vlquant.runtime.generate import Generation

    calls = stand_in("vlquant.runtime.chat", "chat")
    options = ["--image", "a.png", "--image", "b.png", "--max-tiles", 2, "--max-new-tokens", 9, "--temperature", 0.5]
    options += ["--top-p", 0.9, "--top-k", 4, "--seed", 7, "--device", "cuda", "--vision", "torch"]
    options += ["--system", "Be brief.", "--prompt", "hf", "--tokenizer", "slow"]
    assert run("chat", "Total?", "-m", "bundle", *options).exit_code == 0
    [((request,), keywords)] = calls
    assert (request.question, request.images, keywords["max_tiles"]) == ("Total?", ("a.png", "b.png"), 2)
    assert keywords["generation"] == Generation(max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=4, seed=7)
    assert (keywords["model"], keywords["device"], keywords["vision"]) == ("bundle", "cuda", "torch")
    assert (request.system_message, keywords["prompt"], keywords["tokenizer"]) == ("Be brief.", "hf", "slow")


def test_chat_without_options_leaves_the_defaults_to_the_records(stand_in):
    from vlquant.request import Request
    from vlquant.runtime.generate import Generation

    calls = stand_in("vlquant.runtime.chat", "chat")
    assert run("chat", "-m", "bundle").exit_code == 0
    [((request,), keywords)] = calls
    assert request == Request("")
    assert keywords["generation"] == Generation()


CHECK_OPTIONS = [
    "--reference", "original", "--max-drop", 2.5, "--limit", 9, "--seed", 3, "--set", "builtin", "--set", "a.tsv", "--metric", "anls",
    "--memory", 5, "--max-new-tokens", 7, "--device", "cuda", "--vision", "fp16",
]  # fmt: skip
CHECKED_WITH = CheckOptions(
    sets=("builtin", "a.tsv"), limit=9, seed=3, metric="anls", max_drop=2.5, memory=5.0, max_new_tokens=7, device="cuda", vision="fp16"
)


@pytest.mark.parametrize("code", [0, 3, 4])
def test_check_passes_every_option_and_its_verdict_is_the_exit_code(stand_in, code):
    calls = stand_in("vlquant.check", "check", result=SimpleNamespace(exit_code=code))
    printed = stand_in("vlquant.check_table", "print_result")
    assert run("check", "bundle", *CHECK_OPTIONS).exit_code == code
    [((bundle,), keywords)] = calls
    assert (bundle, keywords["reference"], keywords["options"]) == ("bundle", "original", CHECKED_WITH)
    assert len(printed) == 1


def test_bisect_takes_the_options_of_check(stand_in):
    calls, printed = stand_in("vlquant.bisect", "bisect"), stand_in("vlquant.check_table", "print_bisection")
    assert run("bisect", "bundle", *CHECK_OPTIONS).exit_code == 0
    [((bundle,), keywords)] = calls
    assert (bundle, keywords["reference"], keywords["options"]) == ("bundle", "original", CHECKED_WITH)
    assert len(printed) == 1


def test_compare_is_called(stand_in):
    from vlquant.request import Request
    from vlquant.runtime.generate import Generation

    calls = stand_in("vlquant.compare", "compare")
    assert run("compare", "a", "b", "What?", "--image", "c.png", "--max-new-tokens", 5, "--max-tiles", 2).exit_code == 0
    [((models, request), keywords)] = calls
    assert (models, request) == (("a", "b"), Request("What?", images=("c.png",)))
    del keywords["console"]
    assert keywords == {"generation": Generation(max_new_tokens=5), "device": "cpu", "max_tiles": 2}


def test_prompt_and_tiles_are_called(stand_in):
    shown = SimpleNamespace(text="the text", ids=[1, 2], tiles=[3])
    prompt, tiles = stand_in("vlquant.show_prompt", "show_prompt", result=shown), stand_in("vlquant.tiles", "tiles", result="cut")
    done = run("prompt", "What?", "-m", "model", "--image", "a.png", "--tokenizer", "slow")
    assert done.stdout == "the text\n" and "2 tokens" in done.stderr
    assert run("prompt", "What?", "-m", "model", "--ids").stdout == "1 2\n"
    (request,), options = prompt[0]
    loading = {"model": "model", "tokenizer": "slow", "prompt": "original", "max_tiles": None}
    assert (request.question, request.images, options) == ("What?", ("a.png",), loading)
    assert run("tiles", "a.png", "--max-tiles", "6", "--draw", "b.png").stdout == "cut\n"
    assert tiles == [(("a.png",), {"model": None, "max_tiles": 6, "draw": Path("b.png")})]


def test_trace_records_or_compares(stand_in):
    traced, compared = stand_in("vlquant.trace", "trace", result="file"), stand_in("vlquant.trace_difference", "first_difference", "here")
    assert run("trace", "model", "--request", "r.json", "-o", "t.safetensors").stdout == "file\n"
    (positional, options) = traced[0]
    assert positional == ("model", Path("r.json"), Path("t.safetensors")) and options["vision"] == "torch"
    done = run("trace", "--compare", "a", "b")
    assert (done.stdout, done.exit_code, compared) == ("here\n", 3, [(("a", "b"), {})])
    assert run("trace", "model").exit_code == run("trace", "--compare", "a").exit_code == 2


def test_demo_and_inspect_are_called(stand_in):
    demo, inspect = stand_in("vlquant.demo", "demo"), stand_in("vlquant.inspect", "inspect")
    assert run("demo", "folder").exit_code == run("inspect", "bundle", "--verify").exit_code == 0
    assert demo[0][0] == ("folder",)
    assert inspect == [(("bundle",), {"verify": True})]


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_of_doctor_says_whether_something_is_broken(stand_in, code):
    looked = stand_in("vlquant.probes", "probe_machine", result="facts")
    judged, printed = stand_in("vlquant.doctor", "doctor", result=SimpleNamespace(exit_code=code)), stand_in("vlquant.doctor_table", "print_diagnosis")
    sys.modules["vlquant.doctor_table"].to_json = lambda diagnosis: "{}\n"
    done = run("doctor", "--json")
    assert (done.exit_code, done.stdout, printed) == (code, "{}\n", [])
    assert run("doctor").exit_code == code and len(printed) == 1
    assert looked == [((), {})] * 2 and judged == [(("facts",), {})] * 2


def test_a_user_error_is_one_line_and_code_2(stand_in):
    stand_in("vlquant.quantize", "quantize", error=BrokenCheckpoint("model.safetensors is cut short; fetch it again."))
    done = run("quantize", "model")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: model.safetensors is cut short; fetch it again.\n"


@pytest.mark.parametrize("options", [["--bits", "5"], ["--method", "awq"], ["--group-size", "7"], ["--samples", "0"]])
def test_an_impossible_recipe_is_refused_before_anything_is_loaded(options):
    done = run("quantize", *options)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--nonsense"], ["nonsense"], ["quantize", "--bits", "four"], ["inspect", "a", "b"], ["chat", "What?", "--frames", "4"], ["prompt", "What?", "--frames", "4"]])
def test_usage_errors_are_code_2(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr


def test_an_interrupt_is_quiet_and_code_130(stand_in):
    stand_in("vlquant.quantize", "quantize", error=KeyboardInterrupt())
    done = run("quantize", "model")
    assert (done.exit_code, done.stdout, done.stderr.strip()) == (130, "", "")


def test_a_bug_keeps_its_traceback(stand_in):
    stand_in("vlquant.quantize", "quantize", error=ZeroDivisionError("a bug"))
    done = run("quantize", "model")
    assert isinstance(done.exception, ZeroDivisionError)
    assert done.exit_code == 1


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    from vlquant import progress
    from vlquant.events import Event

    now = iter([0.0, *range(0, 1000, 5)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.drawn_progress() as report:
        for done in range(1, 9):
            report(Event("layers", done, 8))
    assert 1 <= len(capsys.readouterr().err.splitlines()) <= 4
