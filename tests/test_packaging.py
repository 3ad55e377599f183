"""What ships: package list, data files, pins, and the README's two commands."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PINS = ROOT / "vlquant" / "pins"

INSTALL = "python3 -m venv .venv && .venv/bin/pip install -e '.[{extras}]' -c vlquant/pins/cpu.txt && .venv/bin/{then}"
TEST_COMMAND = INSTALL.format(extras="cpu,test", then="pytest")
DEMO_COMMAND = INSTALL.format(extras="cpu", then="vlquant demo")


def folder_of(package: str) -> str:
    return SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))


def requirement_name(line: str) -> str:
    return re.match(r"[\w.-]+", line)[0].lower().replace("-", "_")


def pinned(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (PINS / name).read_text().splitlines()]
    return {requirement_name(line): line.partition("==")[2] for line in lines if line}


def test_every_package_is_listed():
    on_disk = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("[!.]*/**/__init__.py") if ".venv" not in path.parts}
    listed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    assert listed == {folder for folder in on_disk if not folder.startswith(("build", "tests"))}


def test_every_data_file_ships():
    patterns = {folder_of(package): globs for package, globs in SETUPTOOLS["package-data"].items()}
    left_out = []
    for folder in map(folder_of, SETUPTOOLS["packages"]):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT / folder).as_posix()
            if path.is_file() and path.suffix not in (".py", ".pyc", ".so"):
                left_out += [f"{folder}/{name}"] * (not any(fnmatch(name, glob) for glob in patterns.get(folder, ())))
    assert left_out == []


def test_tests_are_not_a_package():
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_four_packages_are_the_folders_at_the_top():
    code = "import vlquant, vlquant.export as e, vlquant.runtime as r, vlquant.calib_data as c; print(*[m.__file__ for m in (e, r, c)])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(ROOT / name / "__init__.py") for name in ("export", "runtime", "calib_data")]


@pytest.mark.parametrize("name", ["cpu.txt", "pascal.txt"])
def test_pins_are_exact_and_name_no_place(name):
    assert all(re.fullmatch(r"[\w.]+", version) for version in pinned(name).values())
    assert not re.search(r"://|file:|--|@ ", (PINS / name).read_text())


def test_the_tested_set_pins_every_direct_dependency():
    extras = PROJECT["project"]["optional-dependencies"]
    direct = {requirement_name(line) for line in PROJECT["project"]["dependencies"] + extras["cpu"] + extras["gpu"] + extras["test"]}
    assert direct - set(pinned("cpu.txt")) == set()


def test_the_pascal_set_stays_below_what_dropped_pascal():
    def numbers(library):
        return tuple(int(part) for part in pinned("pascal.txt")[library].split("."))

    assert numbers("torch") < (2, 8)
    assert numbers("nvidia_cudnn_cu12") < (9, 11)
    assert numbers("onnxruntime_gpu") < (1, 27)
    assert numbers("bitsandbytes") < (0, 50)


@pytest.mark.parametrize("command", [TEST_COMMAND, DEMO_COMMAND])
def test_readme_has_the_two_commands(command):
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_ci_runs_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    found = re.search(r"^bash .*readme_command \"('[^\"]+)\"", script, re.MULTILINE)
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(line for line in lines if found[1] in line) == TEST_COMMAND
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_readme_tree_names_every_module():
    tree = (ROOT / "README.md").read_text()
    missing = [
        f"{folder_of(package)}/{path.name}"
        for package in SETUPTOOLS["packages"]
        for path in sorted((ROOT / folder_of(package)).glob("*.py"))
        if not path.name.startswith("__") and not re.search(rf"^ +{path.stem}(\.py)? ", tree, re.MULTILINE)
    ]
    assert missing == []
