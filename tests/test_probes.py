"""Looking at this machine: the real probes, and how libraries that break are told."""

import json
import signal
import subprocess
import sys
import time
import types
from importlib import metadata
from pathlib import Path

import pytest

from vlquant import library_probes, nvidia, probes
from vlquant.doctor import doctor
from vlquant.doctor_rules import BROKEN
from vlquant.doctor_table import to_json
from vlquant.runtime import nvrtc
from vlquant.runtime.native import native_kernels


@pytest.fixture(scope="module")
def machine():
    return probes.probe_machine()


def test_this_machine_can_run_vlquant(machine):
    import torch

    diagnosis = doctor(machine)
    assert diagnosis.verdict[0] == "vlquant runs on the CPU"
    assert machine.versions["torch"] == metadata.version("torch") and machine.torch.cuda == torch.version.cuda
    assert "CPUExecutionProvider" in machine.ran and set(machine.ran) <= set(machine.providers)
    broken = {each.part for each in diagnosis.findings if each.severity == BROKEN}
    assert not broken & {"torch", "cpu kernels", "nvrtc"} and machine.cpu.cores >= 1
    assert json.loads(to_json(diagnosis))["exit_code"] == (3 if broken else 0)


def test_every_probe_is_asked_only_where_it_makes_sense():
    everything = {"torch": "2", "onnxruntime-gpu": "1", "bitsandbytes": "0"}
    assert set(probes.wanted_probes(everything, has_gpu=True)) == set(library_probes.PROBES)
    assert not [name for name in probes.wanted_probes(everything, has_gpu=False) if "cuda" in name]
    assert probes.wanted_probes({}, has_gpu=True) == ["nvrtc", "cpu kernels"]


def test_a_library_that_takes_its_process_along_is_a_reason(monkeypatch):
    monkeypatch.setattr(probes, "probe_command", lambda name: ["/bin/sh", "-c", "kill -ABRT $$"])
    assert probes.ask_library("torch") == (None, "its process was ended by SIGABRT")


def test_a_library_that_hangs_is_a_reason(monkeypatch):
    monkeypatch.setattr(probes, "SECONDS", 0.2)
    monkeypatch.setattr(probes, "probe_command", lambda name: ["sleep", "20"])
    assert probes.ask_library("torch") == (None, "no answer within 0.2 seconds")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that interrupts")
def test_a_library_that_hangs_does_not_keep_who_is_told_to_end(monkeypatch):
    def leave(*_):
        raise SystemExit(143)

    monkeypatch.setattr(probes, "probe_command", lambda name: ["sleep", "60"])
    before, started = signal.signal(signal.SIGALRM, leave), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(SystemExit):
            probes.ask_libraries(["torch", "onnxruntime", "bitsandbytes"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 30


def test_the_last_word_of_a_process_is_its_reason():
    assert probes.ask_library("no such probe") == (None, "KeyError: 'no such probe'")


def test_the_library_that_onnx_runtime_could_not_load_is_told():
    log = (
        "[E:onnxruntime:Default, provider_bridge_ort.cc:2195 TryGetProviderInfo_CUDA] bridge.cc:1778 Failed to load library "
        "libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open shared object file\n\nMissingDependency: it did not start\n"
    )
    assert probes.reason_of(1, log) == "MissingDependency: it did not start (libcublasLt.so.12: cannot open shared object file)"
    assert probes.reason_of(7, "") == "exit code 7"


def test_an_error_is_told_in_one_line(capsys):
    library_probes.first_line(RuntimeError, RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA"), None)
    assert capsys.readouterr().err == "RuntimeError: CUDA error: no kernel image\n"


def test_cards_that_were_hidden_on_purpose_are_told(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(RuntimeError, match="no CUDA device, CUDA_VISIBLE_DEVICES being '-1'"):
        library_probes.torch_on_cuda()


def test_a_wrong_product_is_an_error():
    library_probes.require_close([8.0, 8.0], 8)
    for wrong in (7.0, float("nan")):
        with pytest.raises(RuntimeError, match="where 8 is right"):
            library_probes.require_close([8.0, wrong], 8)


def test_the_library_of_bitsandbytes_is_the_one_that_loaded():
    library = library_probes.bitsandbytes_on("cpu")["library"]
    assert library is None or library.startswith("libbitsandbytes_")


def test_cpu_kernels_are_optional():
    found = library_probes.cpu_kernels()
    kernels = native_kernels()
    assert found is None or found["file"].startswith("_kernels")
    assert len(found["choices"] if found else ()) == (kernels.instructions if kernels else 0)


def test_the_choice_of_kernels_is_found_in_the_environment(monkeypatch):
    monkeypatch.setattr(probes, "ask_libraries", lambda names: ({"cpu kernels": {"file": "a.so", "choices": ["avx2"]}}, {}))
    monkeypatch.setenv("VLQUANT_KERNELS", "vnni")
    machine = probes.probe_machine()
    assert (machine.kernels_asked, machine.kernel_choices) == ("vnni", ("avx2",))


def test_nvrtc_is_asked_as_the_runtime_does(monkeypatch):
    """With libraries in its place: the first cannot be opened, and the system finds one of the others twice."""

    def answering(name, version, architectures):
        def tell(major, minor):
            major._obj.value, minor._obj.value = version
            return 0

        def count(number):
            number._obj.value = len(architectures)
            return 0

        def fill(array):
            array[:] = architectures
            return 0

        return types.SimpleNamespace(_name=name, nvrtcVersion=tell, nvrtcGetNumSupportedArchs=count, nvrtcGetSupportedArchs=fill)

    there = {
        "/wheel/libnvrtc.so.13": answering("/wheel/libnvrtc.so.13", (13, 0), [75, 90]),
        "libnvrtc.so.13": answering("libnvrtc.so.13", (13, 0), [75, 90]),
        "libnvrtc.so.12": answering("libnvrtc.so.12", (12, 6), [61, 90]),
    }
    monkeypatch.setattr(nvrtc, "nvrtc_paths", lambda: ["/broken/libnvrtc.so.12", *there])
    monkeypatch.setattr(nvrtc, "_open", there.get)
    assert library_probes.nvrtc() == [
        {"library": "libnvrtc.so.13", "version": "13.0", "architectures": [75, 90]},
        {"library": "libnvrtc.so.12", "version": "12.6", "architectures": [61, 90]},
    ]


def test_nvrtc_is_asked_where_torch_is_broken():
    code = "import sys; sys.modules['torch'] = None\nfrom vlquant.library_probes import nvrtc\nprint(nvrtc())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr


def test_a_graph_that_onnx_runtime_cannot_open_is_told_in_its_own_words(monkeypatch):
    """Not as advice to export a vision tower again, of a folder that is gone by then."""
    import onnxruntime

    def refuse(*_, **__):
        raise RuntimeError("no kernel for MatMul")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(RuntimeError, match="^no kernel for MatMul$"):
        library_probes.onnxruntime_on("cpu")


def test_this_package_is_found_from_anywhere(tmp_path, monkeypatch):
    root = Path(probes.__file__).parents[1]
    monkeypatch.chdir(root)
    assert probes.find_place() == probes.Place(".", "vlquant/pins")
    monkeypatch.chdir(tmp_path)
    place = probes.find_place()
    assert place == probes.Place(str(root), str(root / "vlquant" / "pins")) and (Path(place.pins) / "pascal.txt").is_file()


def test_cards_are_asked_of_the_driver(monkeypatch):
    """With a library in NVML's place; the second card may not be asked."""
    def text(value):
        return lambda *arguments: setattr(next(each for each in arguments if hasattr(each, "value")), "value", value) or 0

    def number(*values):
        def write(*arguments):
            for place, value in zip(arguments[-len(values):], values, strict=True):
                place._obj.value = value
            return 0

        return write

    def memory(handle, place):
        place._obj.total = 11_720_000_000
        return 0

    def pci(handle, place):
        place._obj.device = 0x1B0610DE
        return 0

    library = types.SimpleNamespace(
        nvmlDeviceGetPciInfo_v3=pci, nvmlInit_v2=lambda: 0, nvmlShutdown=lambda: 0, nvmlDeviceGetMemoryInfo=memory,
        nvmlSystemGetDriverVersion=lambda place, size: setattr(place, "value", b"580.159.03"),
        nvmlDeviceGetCount_v2=number(2), nvmlDeviceGetHandleByIndex_v2=lambda index, handle: 15 * index,
        nvmlDeviceGetName=lambda handle, place, size: setattr(place, "value", b"GTX 1080 Ti") or 0,
        nvmlDeviceGetCudaComputeCapability=number(6, 1),
    )  # fmt: skip
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda name: library)
    assert nvidia.find_driver() == ("580.159.03", (nvidia.Gpu("GTX 1080 Ti", (6, 1), 11_720_000_000, 0x1B06),))
    del library.nvmlDeviceGetPciInfo_v3
    assert nvidia.find_driver()[1][0].device is None


def test_a_kernel_module_tells_its_version(tmp_path):
    path = tmp_path / "version"
    assert nvidia.kernel_module_version(path) is None
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Wed Mar  4 2026\nGCC version: gcc 12\n")
    assert nvidia.kernel_module_version(path) == "580.159.03"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  590.44.01  Release Build\n")
    assert nvidia.kernel_module_version(path) == "590.44.01"


def test_cards_are_found_on_the_bus(tmp_path):
    for name, vendor, device, kind in [("a", "0x10de", "0x1b06", "0x030000"), ("d", "0x10de", "0x1b06", "0x030000"), ("e", "0x10de", "0x2204", "0x030200"), ("b", "0x10de", "0x10ef", "0x040300"), ("c", "0x8086", "0x1b06", "0x030000")]:
        (tmp_path / name).mkdir()
        for file, value in (("vendor", vendor), ("device", device), ("class", kind)):
            (tmp_path / name / file).write_text(value + "\n")
    assert nvidia.unseen_devices(folder=tmp_path) == (0x1B06, 0x1B06, 0x2204)
    assert nvidia.unseen_devices(folder=tmp_path / "nothing") == ()
    cards = {device: nvidia.Gpu("a card", (6, 1), 1, device) for device in (0x1B06, 0x2204, None)}
    assert nvidia.unseen_devices([cards[0x2204], cards[0x1B06]], tmp_path) == (0x1B06,)  # One of the two alike.
    assert nvidia.unseen_devices([cards[0x2204], cards[None]], tmp_path) == ()
