"""Every kernel compiles for four generations of cards without a GPU, and what comes out is what was meant."""

import functools
import re

import pytest

from vlquant.errors import MissingDependency
from vlquant.runtime import nvrtc
from vlquant.runtime.cuda_attention import ATTENTION_FILES
from vlquant.runtime.cuda_driver import KERNEL_FOLDER, kernel_source
from vlquant.runtime.cuda_linear import INT8_FILES, LINEAR_FILES
from vlquant.runtime.nvrtc import Program, compile_cubin, compile_program, load_nvrtc, nvrtc_version

from tests.kernels_on_cpu import kernel_names
from tests.test_cuda_attention import GROUPS

CAPABILITIES = [(6, 1), (7, 5), (8, 6), (9, 0)]
EM_CUDA = 190

by_capability = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda each: "sm_{}{}".format(*each))


@functools.cache
def compiled(capability: tuple[int, int], files: tuple[str, ...], defines: tuple[str, ...] = ()) -> Program:
    options = ["--gpu-architecture=sm_{}{}".format(*capability), "--std=c++14", "--ptxas-options=-v"]
    options += [f"--define-macro={each}" for each in defines]
    return compile_program(load_nvrtc(capability), kernel_source(files), options)


def attention(capability: tuple[int, int], group: int, head_dim: int, cache: str = "half_bits") -> Program:
    return compiled(capability, ATTENTION_FILES, (f"HEAD_DIM={head_dim}", f"GROUP={group}", f"CACHE={cache}"))


def bodies(ptx: str) -> dict[str, str]:
    """The instructions of every kernel."""
    return dict(re.findall(r"\.entry (\w+)\(.*?\)\n(.*?\n\})", ptx, re.S))


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes spilled of every kernel."""
    found = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.S)
    return {name: (int(registers), int(spilled)) for name, spilled, registers in found}


def assert_is_for(program: Program, capability: tuple[int, int], kernels: set[str]) -> None:
    cubin = program.cubin
    assert cubin[:4] == b"\x7fELF" and int.from_bytes(cubin[18:20], "little") == EM_CUDA
    assert cubin[48] == 10 * capability[0] + capability[1]  # e_flags begins with the architecture
    assert ".target sm_{}{}\n".format(*capability) in program.ptx
    assert set(bodies(program.ptx)) == kernels
    assert all(f".text.{name}\0".encode() in cubin for name in kernels)


@by_capability
@pytest.mark.parametrize(("files", "count"), [(LINEAR_FILES, 16 + 4), (INT8_FILES, 8 + 1)], ids=["exact", "int8"])
def test_linear_kernels(capability, files, count):
    names = set(kernel_names(kernel_source(files)))
    assert_is_for(compiled(capability, files), capability, names)
    assert len(names) == count


@by_capability
@pytest.mark.parametrize(("group", "head_dim"), GROUPS)
def test_attention_of_every_member(capability, group, head_dim):
    program = attention(capability, group, head_dim)
    assert_is_for(program, capability, {"attend_splits", "join_splits"})
    assert all(spilled == 0 for _, spilled in resources(program.log).values())


@by_capability
def test_attention_over_a_float_cache(capability):
    assert_is_for(attention(capability, 4, 128, "float"), capability, {"attend_splits", "join_splits"})


@by_capability
def test_registers_leave_room_for_many_warps(capability):
    used = {name: each for files in (LINEAR_FILES, INT8_FILES) for name, each in resources(compiled(capability, files).log).items()}
    assert {name for name, (_, spilled) in used.items() if spilled} == set()
    one_token = {name: registers for name, (registers, _) in used.items() if re.fullmatch(r"gemv_\w+_1", name)}
    # 64 registers let a processor hold 32 warps, which is what hides memory's latency.
    assert len(one_token) == 6 and max(one_token.values()) <= 64
    assert max(registers for registers, _ in used.values()) <= 168


def test_pascal_never_calculates_in_half_precision():
    """1/64 of full rate there: halves are loaded, stored and converted, nothing else."""
    for program in (compiled((6, 1), LINEAR_FILES), compiled((6, 1), INT8_FILES), *(attention((6, 1), *shape) for shape in GROUPS)):
        arithmetic = re.findall(r"^\s*((?:add|sub|mul|fma|mad|min|max|neg|abs|set|ex2|tanh)\S*\.b?f16\S*)", program.ptx, re.M)
        assert arithmetic == [] and "f16x2" not in program.ptx


@by_capability
def test_byte_products_are_single_instructions(capability):
    found = bodies(compiled(capability, INT8_FILES).ptx)
    assert {name for name, body in found.items() if "dp4a" in body} == {name for name in found if name.startswith("gemv_int8")}
    assert "dp4a" not in compiled(capability, LINEAR_FILES).ptx


def test_weights_are_not_converted_one_by_one():
    """Integer to float runs at quarter rate: codes become floats by their bits. Scales are halves and are converted."""
    found = bodies(compiled((6, 1), LINEAR_FILES).ptx)
    for name in ("gemv_4bit_1", "gemv_8bit_1", "gemv_bfloat16_1"):
        assert re.findall(r"cvt\.rn\.f32\.[us]\d+", found[name]) == [], name


def test_a_p100_compiles_all_but_byte_products():
    """Compute capability 6.0 has no dp4a; `with_int8_activations` refuses it first."""
    assert set(bodies(compiled((6, 0), INT8_FILES).ptx)) == {"round_activations"}


def test_sources_need_no_header():
    sources = sorted(KERNEL_FOLDER.glob("*.cu"))
    assert {path.stem for path in sources} == {*LINEAR_FILES, *INT8_FILES, *ATTENTION_FILES}
    assert all("#include" not in path.read_text() for path in sources)


def test_the_compiler_knows_pascal():
    assert nvrtc_version(load_nvrtc((6, 1)))[0] == 12


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlquant" / "kernels"


TINY = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }'


def test_nothing_is_compiled_twice(cache, monkeypatch):
    first = compile_cubin(TINY, (8, 6), defines=("FACTOR=2",))
    other = compile_cubin(TINY, (8, 6), defines=("FACTOR=3",))
    assert first != other and len(list(cache.glob("*.cubin"))) == 2
    monkeypatch.setattr(nvrtc, "compile_program", lambda *arguments: pytest.fail("compiled again"))
    assert compile_cubin(TINY, (8, 6), defines=("FACTOR=2",)) == first
    with pytest.raises(pytest.fail.Exception):
        compile_cubin(TINY, (9, 0), defines=("FACTOR=2",))


def test_what_was_kept_is_replaced_on_demand(cache):
    right = compile_cubin(TINY, (8, 6), defines=("FACTOR=2",))
    (kept,) = cache.glob("*.cubin")
    kept.write_bytes(right[:100])
    assert compile_cubin(TINY, (8, 6), defines=("FACTOR=2",)) == right[:100]
    assert compile_cubin(TINY, (8, 6), defines=("FACTOR=2",), anew=True) == right == kept.read_bytes()


def test_a_cache_that_cannot_be_written_is_done_without(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the folder's place")
    assert compile_cubin(TINY, (8, 6), defines=("FACTOR=2",))[:4] == b"\x7fELF"


def test_a_source_with_a_mistake_is_shown_with_its_line(cache):
    with pytest.raises(RuntimeError, match=r"vlquant.cu\(1\): error: .*FACTOR"):
        compile_cubin(TINY, (8, 6))


def test_no_compiler_at_all(cache, monkeypatch):
    monkeypatch.setattr(nvrtc, "nvrtc_paths", lambda: ["libnvrtc-that-is-not-here.so"])
    with pytest.raises(MissingDependency, match="pip install nvidia-cuda-nvrtc-cu12 .*, or choose --device cpu"):
        compile_cubin(TINY, (8, 6))


def test_a_compiler_that_does_not_know_a_card_is_passed_over(monkeypatch):
    """CUDA 13's for Pascal, an old one for a new card."""
    with pytest.raises(MissingDependency, match="none is here that knows compute capability 99.0"):
        load_nvrtc((99, 0))
    monkeypatch.setattr(nvrtc, "known_architectures", lambda library: [75, 80, 86, 90, 100, 120])
    assert load_nvrtc((7, 5))
    with pytest.raises(MissingDependency, match="none is here that knows compute capability 6.1; .*CUDA 13 dropped"):
        load_nvrtc((6, 1))
