"""Looking at this machine: the real probes, and how libraries that break are told."""

import ctypes
import json
import sys
import types
from importlib import metadata

import pytest

from vlquant import library_probes, nvidia, probes
from vlquant.doctor import doctor
from vlquant.doctor_table import to_json


@pytest.fixture(scope="module")
def machine():
    return probes.probe_machine()


def test_this_machine_can_run_vlquant(machine):
    import torch

    diagnosis = doctor(machine)
    assert diagnosis.verdict[0] == "vlquant runs on the CPU"
    assert machine.versions["torch"] == metadata.version("torch") and machine.torch.cuda == torch.version.cuda
    assert "CPUExecutionProvider" in machine.ran and set(machine.ran) <= set(machine.providers)
    assert machine.cpu.cores >= 1 and json.loads(to_json(diagnosis))["exit_code"] == diagnosis.exit_code


def test_every_probe_is_asked_only_where_it_makes_sense():
    everything = {"torch": "2", "onnxruntime-gpu": "1", "bitsandbytes": "0"}
    assert set(probes.wanted_probes(everything, has_gpu=True)) == set(library_probes.PROBES)
    assert not [name for name in probes.wanted_probes(everything, has_gpu=False) if "cuda" in name]
    assert probes.wanted_probes({}, has_gpu=True) == ["nvrtc", "cpu kernels"]


def test_a_library_that_takes_its_process_along_is_a_reason(monkeypatch):
    real = probes.subprocess.run
    monkeypatch.setattr(probes.subprocess, "run", lambda command, **options: real(["/bin/sh", "-c", "kill -ABRT $$"], **options))
    assert probes.ask_library("torch") == (None, "its process was ended by SIGABRT")


def test_a_library_that_hangs_is_a_reason(monkeypatch):
    real = probes.subprocess.run
    monkeypatch.setattr(probes, "SECONDS", 0.2)
    monkeypatch.setattr(probes.subprocess, "run", lambda command, **options: real(["sleep", "20"], **options))
    assert probes.ask_library("torch") == (None, "no answer within 0.2 seconds")


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
    assert found is None or found["file"].startswith("_kernels")


def test_nvrtc_of_a_wheel_is_found_and_asked(monkeypatch, tmp_path):
    """With a library in its place that answers as NVRTC does."""
    path = tmp_path / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
    path.parent.mkdir(parents=True)
    path.touch()

    def version(major, minor):
        major._obj.value, minor._obj.value = 12, 6

    def count(number):
        number._obj.value = 2

    def architectures(array):
        array[0], array[1] = 61, 90

    answers = types.SimpleNamespace(nvrtcVersion=version, nvrtcGetNumSupportedArchs=count, nvrtcGetSupportedArchs=architectures)
    opened = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(name) or answers)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert library_probes.nvrtc() == {"library": "libnvrtc.so.12", "version": "12.6", "architectures": [61, 90]}
    assert opened == [str(path)]


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

    library = types.SimpleNamespace(
        nvmlInit_v2=lambda: 0, nvmlShutdown=lambda: 0, nvmlDeviceGetMemoryInfo=memory,
        nvmlSystemGetDriverVersion=lambda place, size: setattr(place, "value", b"580.159.03"),
        nvmlDeviceGetCount_v2=number(2), nvmlDeviceGetHandleByIndex_v2=lambda index, handle: 15 * index,
        nvmlDeviceGetName=lambda handle, place, size: setattr(place, "value", b"GTX 1080 Ti") or 0,
        nvmlDeviceGetCudaComputeCapability=number(6, 1),
    )  # fmt: skip
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda name: library)
    assert nvidia.find_driver() == ("580.159.03", (nvidia.Gpu("GTX 1080 Ti", (6, 1), 11_720_000_000),))


def test_a_kernel_module_tells_its_version(tmp_path):
    path = tmp_path / "version"
    assert nvidia.kernel_module_version(path) is None
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Wed Mar  4 2026\nGCC version: gcc 12\n")
    assert nvidia.kernel_module_version(path) == "580.159.03"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  590.44.01  Release Build\n")
    assert nvidia.kernel_module_version(path) == "590.44.01"


def test_cards_are_found_on_the_bus(tmp_path):
    for name, vendor, device, kind in [("a", "0x10de", "0x1b06", "0x030000"), ("b", "0x10de", "0x10ef", "0x040300"), ("c", "0x8086", "0x1b06", "0x030000")]:
        (tmp_path / name).mkdir()
        for file, value in (("vendor", vendor), ("device", device), ("class", kind)):
            (tmp_path / name / file).write_text(value + "\n")
    assert nvidia.unseen_devices(tmp_path) == (0x1B06,)
    assert nvidia.unseen_devices(tmp_path / "nothing") == ()
