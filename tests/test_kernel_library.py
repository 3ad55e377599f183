"""The compiled library: which one is opened, its threads, and what becomes of both in other threads and processes."""

import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vlquant import library_probes
from vlquant.errors import VlquantError
from vlquant.runtime import native
from vlquant.runtime.kernel_library import LAYOUT
from vlquant.runtime.native import Kernels, NativeLinear, native_kernels, packed_matrix

from tests.test_native import random_codes

FOUND = native_kernels()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_child_after_fork_has_its_own_threads():
    code = (
        "import os, torch; torch.set_num_threads(2)\n"
        "from vlquant.runtime.native import *\n"
        "m = packed_matrix(torch.ones(16, 32, dtype=torch.uint8), torch.ones(1, 16).half(), None, bits=4)\n"
        "f = lambda: NativeLinear(native_kernels(), m)(torch.ones(1, 32))\n"
        "f()\n"
        "child = os.fork()\n"
        "if child == 0: f(); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert run_python(code).stdout.strip() == "7"


WAITING = (
    "import os, threading, time, torch\n"
    "from vlquant.runtime.native import *\n"
    "m = packed_matrix(torch.ones(4096, 4096, dtype=torch.uint8), torch.ones(32, 4096).half(), None, bits=4)\n"
    "linear, x = NativeLinear(native_kernels(), m), torch.ones(200, 4096)\n"
)


def test_a_child_of_a_process_whose_kernels_work_can_use_them():
    code = WAITING + (
        "running = True\n"
        "def work():\n"
        "    while running: linear(x)\n"
        "thread = threading.Thread(target=work); thread.start(); time.sleep(0.5)\n"
        "for _ in range(3):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        linear(x[:1]); os._exit(7)\n"
        "    deadline = time.monotonic() + 20\n"
        "    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline: time.sleep(0.05)\n"
        "    print(os.waitstatus_to_exitcode(ended[1]) if ended[0] else os.kill(child, 9))\n"
        "running = False; thread.join()\n"
    )
    assert run_python(code).stdout.split() == ["7"] * 3


def test_threads_that_ask_first_get_the_same_kernels():
    code = (
        "import threading, time\n"
        "from vlquant.runtime import native\n"
        "load = native.Kernels\n"
        "native.Kernels = lambda *given: (time.sleep(0.2), load(*given))[1]\n"
        "found = []\n"
        "threads = [threading.Thread(target=lambda: found.append(native.native_kernels())) for _ in range(4)]\n"
        "[each.start() for each in threads], [each.join() for each in threads]\n"
        "print(len(found), len({id(each) for each in found}))\n"
    )
    assert run_python(code).stdout.split() == ["4", "1"]


def test_two_openings_of_the_library_take_turns():
    # One library has one team, whatever holds it.
    codes, scales = random_codes(512, 1024, 4, 8)
    matrix = packed_matrix(codes, scales, None, bits=4)
    linears = [NativeLinear(Kernels(FOUND.library._name), matrix) for _ in range(2)]
    x, before = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wanted = linears[0](x)
        with ThreadPoolExecutor(2) as pool:
            assert all(torch.equal(found, wanted) for found in pool.map(lambda n: linears[n % 2](x), range(200)))
    finally:
        torch.set_num_threads(before)


def test_a_library_of_other_sources_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "kernels.c"
    for text in ("int vlquant_instructions(void) { return 2; }", f"int vlquant_layout(void) {{ return {LAYOUT + 1}; }}"):
        source.write_text(text)
        library = tmp_path / f"{len(text)}.so"
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
        with pytest.raises(VlquantError, match=r"built from other sources .* run pip install -e \. again"):
            Kernels(str(library))
        monkeypatch.setattr("vlquant.runtime.kernel_library.library_path", lambda: str(library))
        with pytest.raises(VlquantError, match="built from other sources"):  # What vlquant doctor shows as broken.
            library_probes.cpu_kernels()


def test_the_layout_has_the_number_of_what_the_kernels_take():
    # When this fails, raise LAYOUT in model.h and kernel_library.py, and put the new digest here.
    folder = Path(native.__file__).parent / "native"
    calls = re.findall(r"^\w[\w *]*vlquant_\w+\([^)]*\)", (folder / "kernels.c").read_text(), re.MULTILINE)
    code = re.sub(r"/\*.*?\*/|enum { LAYOUT.*?;", " ", (folder / "model.h").read_text() + "".join(calls), flags=re.DOTALL)
    digest = hashlib.sha256(" ".join(code.split()).encode()).hexdigest()[:16]
    assert FOUND.library.vlquant_layout() == LAYOUT
    assert (LAYOUT, digest) == (4, "51053102278c19fb")


def test_the_processor_is_asked_for_all_that_is_compiled_for():
    folder = Path(native.__file__).parent / "native"
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)|bit_(\w+)', (folder / "kernels.c").read_text()))
    asked = {(name or bit).lower() for name, bit in asked}
    for file in ("vnni.c", "avx2.c"):
        gcc, clang = (re.findall(rf'pragma {name}.*target\("([\w,]+)"\)', (folder / file).read_text()) for name in ("GCC", "clang"))
        assert gcc == clang and set(gcc[0].split(",")) <= asked, file


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_changes_of_size_leave_no_threads_behind():
    code = (
        "import os, torch\n"
        "from vlquant.runtime.native import *\n"
        "g = torch.Generator().manual_seed(0)\n"
        "m = packed_matrix(torch.randint(0, 16, (256, 32), dtype=torch.uint8, generator=g), torch.ones(1, 256).half(), None, bits=4)\n"
        "linear, x, counts = NativeLinear(native_kernels(), m), torch.randn(9, 32, generator=g), []\n"
        "wanted = linear(x)\n"
        "for n in range(3000):\n"
        "    torch.set_num_threads(1 + 7 * n % 4)\n"
        "    assert torch.equal(linear(x), wanted)\n"
        "    if n in (3, 2999): counts.append(len(os.listdir('/proc/self/task')))\n"
        "print(counts[1] - counts[0])\n"
    )
    assert run_python(code).stdout.strip() == "0"


@pytest.mark.parametrize("wanted, printed", [("torch", "None"), ("avx2", "1"), ("", str(FOUND and FOUND.instructions))])
def test_the_environment_chooses(wanted, printed):
    code = "from vlquant.runtime.native import native_kernels as k; print(k() and k().instructions)"
    assert run_python(code, VLQUANT_KERNELS=wanted).stdout.strip() == printed


def test_an_unknown_choice_is_a_sentence():
    found = run_python("from vlquant.runtime.native import native_kernels as k; k()", VLQUANT_KERNELS="sse")
    assert "VLQUANT_KERNELS is 'sse'; set it to torch, avx2 or vnni" in found.stderr
