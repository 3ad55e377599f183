"""The budget that keeps files readable: lines, parameters, nesting."""

import ast
from pathlib import Path

import pytest

from vlquant import errors

ROOT = Path(__file__).parents[1]
PACKAGES = ("vlquant", "export", "runtime", "calib_data")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))

FILE_LINES = 350
FUNCTION_LINES = 45
PARAMETERS = 6
NESTING = 3
VAGUE_NAMES = {"utils", "helpers", "common", "core", "misc"}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def is_command(function: ast.FunctionDef) -> bool:
    """Whether the parameters are a command's options, which are as many as the command has."""
    return any(ast.unparse(decorator).startswith("app.") for decorator in function.decorator_list)


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    return [name for name in names if name not in ("self", "cls")]


def is_public(function: ast.FunctionDef) -> bool:
    return not function.name.startswith("_") or function.name.startswith("__")


def depth(node: ast.AST) -> int:
    """How many blocks lie inside one another; an `elif` is as deep as its `if`."""
    inner = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        inner = max(inner, depth(child) - is_elif)
    return inner + isinstance(node, BLOCKS)


@pytest.mark.parametrize("path", MODULES + TESTS, ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= FILE_LINES, "split it by the question it answers"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short(path):
    lengths = {
        f"{function.name}, line {function.lineno}": function.end_lineno - function.lineno + 1
        for function in functions(path)
        if not is_command(function)
    }
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_functions_take_few_parameters(path):
    counts = {
        function.name: len(parameters(function))
        for function in functions(path)
        if is_public(function) and not is_command(function)
    }
    assert {name: count for name, count in counts.items() if count > PARAMETERS} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nesting_is_shallow(path):
    depths = {function.name: depth(function) for function in functions(path)}
    assert {name: levels for name, levels in depths.items() if levels > NESTING} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_are(path):
    assert path.name == "__main__.py" or ast.get_docstring(ast.parse(path.read_text())), "module docstring: its boundary"
    assert path.stem not in VAGUE_NAMES, "name it after what it does"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_error_messages_end_without_a_full_stop(path):
    """As Python's own do; one rule for all of them."""
    source = path.read_text()
    messages = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args and is_our_error(node)]
    ends = [ast.get_source_segment(source, node.args[-1]) for node in messages]
    assert [end for end in ends if end[-2:-1] == "." and end[-4:-1] != "..."] == []


def is_our_error(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and hasattr(errors, call.func.id)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_errors_are_caught_by_name_or_passed_on(path):
    swallowed = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not isinstance(node.body[-1], ast.Raise)
    ]
    assert swallowed == [], "catch the error that you can answer, by its class"
