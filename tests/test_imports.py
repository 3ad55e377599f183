"""Which module may import which (design: cli -> verbs -> export, runtime, calib_data -> foundations)."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"vlquant": "vlquant", "export": "vlquant.export", "runtime": "vlquant.runtime", "calib_data": "vlquant.calib_data"}

COMMAND_LINE = {"vlquant.cli", "vlquant.cli_options", "vlquant.cli_comparison", "vlquant.cli_inspection", "vlquant.cli_planning", "vlquant.progress", "vlquant.__main__"}
VERBS = {
    "vlquant.quantize",
    "vlquant.rehearsal",
    "vlquant.feasibility",
    "vlquant.reload",
    "vlquant.unfinished",
    "vlquant.calibration_sets",
    "vlquant.reference_answers",
    "vlquant.check",
    "vlquant.check_table",
    "vlquant.check_folder",
    "vlquant.asking",
    "vlquant.examination",
    "vlquant.comparison",
    "vlquant.blame",
    "vlquant.part_distances",
    "vlquant.findings_summary",
    "vlquant.forced",
    "vlquant.bisect",
    "vlquant.compare",
    "vlquant.bench",
    "vlquant.bench_result",
    "vlquant.bench_shape",
    "vlquant.bench_table",
    "vlquant.contestant",
    "vlquant.contestant_torch",
    "vlquant.contestant_vlquant",
    "vlquant.contestants",
    "vlquant.gguf_shape",
    "vlquant.peer_llama_cpp",
    "vlquant.peer_onnxruntime_genai",
    "vlquant.peer_openvino",
    "vlquant.peer_transformers",
    "vlquant.reference",
    "vlquant.controls",
    "vlquant.demo",
    "vlquant.doctor",
    "vlquant.doctor_facts",
    "vlquant.doctor_rules",
    "vlquant.doctor_table",
    "vlquant.library_probes",
    "vlquant.probes",
    "vlquant.inspect",
    "vlquant.memory",
    "vlquant.plan",
    "vlquant.plan_table",
    "vlquant.show_prompt",
    "vlquant.synthesize",
    "vlquant.tiles",
    "vlquant.trace",
}
QUANTIZERS = {
    "vlquant.gptq",
    "vlquant.activations",
    "vlquant.bit_choice",
    "vlquant.calibrate",
    "vlquant.fitting",
    "vlquant.quantized_layers",
}

DISTRIBUTIONS = {"PIL": "pillow"}
"""Modules whose distribution has another name."""
OPTIONAL = {"onnxruntime"}
"""Modules that come with an extra, because there are two packages of that name."""
PEERS = {
    "vlquant.gguf_shape": {"gguf"},
    "vlquant.peer_llama_cpp": {"llama_cpp"},
    "vlquant.peer_onnxruntime_genai": {"onnxruntime_genai", "transformers"},
    "vlquant.peer_openvino": {"openvino"},
    "vlquant.peer_transformers": {"transformers"},
}
"""Other programs, which vlquant bench measures where they are installed, and the only modules that import them."""


def module_name(path: Path) -> str:
    return f"{FOLDERS[path.parent.name]}.{path.stem}".removesuffix(".__init__")


MODULES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))}


def imported(path: Path) -> set[str]:
    """Full names of what a file imports anywhere in it; `from vlquant import bundle` counts as vlquant.bundle."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import on line {node.lineno}"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & set(MODULES) or {node.module}
    return names


def layer(module: str) -> str:
    """The layer of one of our modules; what nobody has placed higher is a foundation."""
    if module in COMMAND_LINE:
        return "command line"
    if module in VERBS:
        return "verbs"
    if module in QUANTIZERS:
        return "quantizers"
    package = ".".join(module.split(".")[:2])
    return package if package in FOLDERS.values() and package != "vlquant" else "foundations"


MAY_IMPORT = {
    "foundations": {"foundations"},
    "vlquant.calib_data": {"foundations", "vlquant.calib_data"},
    # export accepts its graph by running it as the runtime will.
    "vlquant.export": {"foundations", "vlquant.export", "vlquant.runtime", "vlquant.calib_data"},
    "vlquant.runtime": {"foundations", "vlquant.runtime", "vlquant.calib_data"},
    "quantizers": {"foundations", "quantizers", "vlquant.calib_data"},
    "verbs": {"foundations", "quantizers", "vlquant.calib_data", "vlquant.export", "vlquant.runtime", "verbs"},
}


def test_the_listed_modules_exist():
    assert COMMAND_LINE | VERBS | QUANTIZERS <= set(MODULES)


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) != "command line"])
def test_imports_point_downwards(module):
    ours = imported(MODULES[module]) & set(MODULES) - {"vlquant"}
    upwards = {name for name in ours if layer(name) not in MAY_IMPORT[layer(module)]}
    assert upwards == set(), f"{layer(module)} may import {MAY_IMPORT[layer(module)]}"


@pytest.mark.parametrize("module", MODULES)
def test_no_second_copy_of_our_modules(module):
    assert not {name.split(".")[0] for name in imported(MODULES[module])} & {"export", "runtime", "calib_data"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_tests_import_our_modules_by_their_names(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"export", "runtime", "calib_data"}


def test_transformers_is_only_what_we_test_against():
    importing = [module for module, path in MODULES.items() if "transformers" in {n.split(".")[0] for n in imported(path)}]
    assert [module for module in importing if module not in PEERS] == []


def third_party() -> set[str]:
    tops = {name.split(".")[0] for module, path in MODULES.items() for name in imported(path) if name.split(".")[0] not in PEERS.get(module, ())}
    return {name for name in tops if name not in sys.stdlib_module_names and name != "vlquant"}


def declared() -> set[str]:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in lines}


def test_nothing_imports_a_peer_but_who_measures_it():
    def ours(path):
        return imported(path) & set(MODULES)

    assert {module: ours(path) & set(PEERS) for module, path in MODULES.items() if module not in PEERS and ours(path) & set(PEERS)} == {}


def test_every_imported_library_is_a_declared_dependency():
    needed = {DISTRIBUTIONS.get(name, name).lower() for name in third_party() - OPTIONAL}
    assert needed - declared() == set()


def test_every_declared_dependency_is_imported():
    needed = {DISTRIBUTIONS.get(name, name).lower() for name in third_party()}
    assert declared() - needed == set()


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["vlquant", "vlquant.cli", "vlquant.errors", "vlquant.recipe", "vlquant.runtime"])
def test_light_modules_stay_light(module):
    heavy = {"torch", "onnx", "onnxruntime", "transformers", "numpy", "PIL", "tokenizers", "sentencepiece", "pydantic", "matplotlib", "jinja2"}
    loaded = run_python(f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})").split()
    assert heavy & set(loaded) == set()


def test_the_runtime_runs_without_the_quantizers():
    unwanted = {"vlquant.gptq", "vlquant.quantize", "vlquant.calibrate", "vlquant.export", "transformers", "bitsandbytes"}
    loaded = run_python("import sys, vlquant.runtime.chat; print(*sys.modules)").split()
    assert unwanted & set(loaded) == set()
