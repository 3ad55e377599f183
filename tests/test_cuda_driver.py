"""What is handed to the driver, which cards a torch runs on, and what is said where there is none."""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from vlquant.errors import InvalidRequest, MissingDependency
from vlquant.runtime import cuda_driver, reader
from vlquant.gpu_support import has_code
from vlquant.runtime.cuda_driver import Card, DriverKernels, kernel_parameters, require_code_for
from vlquant.runtime.reader import require_device

CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_130 = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]

CARDS = [
    ("GTX 1080 Ti", (6, 1), CUDA_126, True),  # sm_60 runs on 6.1, and no wheel lists sm_61
    ("GTX 1080 Ti", (6, 1), CUDA_128, False),
    ("GTX 1080 Ti", (6, 1), CUDA_130, False),
    ("P100", (6, 0), CUDA_126, True),
    ("P100", (6, 0), ["sm_61"], False),
    ("T4", (7, 5), CUDA_130, True),
    ("V100", (7, 0), CUDA_130, False),
    ("RTX 3090", (8, 6), ["sm_80"], True),
    ("RTX 4090", (8, 9), CUDA_126, True),
    ("H200", (9, 0), CUDA_128, True),
    ("H200", (9, 0), CUDA_130, True),
    ("a card after 9.0", (9, 1), ["sm_90a"], False),
    ("a card of the future", (14, 0), CUDA_130, True),  # by PTX
    ("a card of the future", (14, 0), CUDA_128, False),
    ("any", (8, 6), [], False),
]


@pytest.mark.parametrize(("name", "capability", "built_for", "runs"), CARDS, ids=lambda each: str(each)[:24])
def test_which_cards_a_build_runs_on(name, capability, built_for, runs):
    assert has_code(built_for, capability) == runs


def test_a_card_that_torch_has_dropped_is_one_sentence(monkeypatch):
    monkeypatch.setattr(cuda_driver, "card_of", lambda device: Card((6, 1), 28))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_130)
    with pytest.raises(MissingDependency, match="compute capability 6.1, .* vlquant/pins/pascal.txt, or choose --device cpu") as caught:
        require_code_for(torch.device("cuda:0"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_126)
    require_code_for(torch.device("cuda:0"))


def test_a_driver_that_does_not_start_is_one_sentence(monkeypatch):
    def broken(device):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update.")

    monkeypatch.setattr(cuda_driver, "card_of", broken)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MissingDependency, match=r"^cuda:0 does not start \(The NVIDIA .* 11040\)\); check the driver, or .* cpu$"):
        require_device("cuda:0")


def test_a_device_is_asked_for_its_code(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(reader, "require_code_for", asked.append)
    assert require_device("cuda:1") == torch.device("cuda:1") and require_device("cpu") == torch.device("cpu")
    assert asked == [torch.device("cuda:1")]
    with pytest.raises(InvalidRequest, match="torch sees 2 CUDA devices"):
        require_device("cuda:2")


def test_arguments_become_addresses_of_values():
    tensor = torch.arange(6.0)
    parameters, values = kernel_parameters((tensor, None, 7, 0.5))
    assert [type(each) for each in values] == [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_float]
    assert values[0].value == tensor.data_ptr() and values[1].value is None
    assert [address for address in parameters] == [ctypes.addressof(each) for each in values]
    assert ctypes.cast(parameters[2], ctypes.POINTER(ctypes.c_int)).contents.value == 7
    assert ctypes.cast(parameters[3], ctypes.POINTER(ctypes.c_float)).contents.value == 0.5


def test_a_tensor_with_gaps_is_a_mistake():
    with pytest.raises(ValueError, match="strides"):
        kernel_parameters((torch.zeros(4, 4).T[1:],))


SECOND = torch.device("cuda:1")


class RecordingDriver:
    """libcuda's four functions that are used; remembers launches."""

    def __init__(self, status: int = 0):
        self.launches, self.looked_up, self.status = [], [], status

    def cuModuleLoadData(self, module, image):
        module._obj.value = 11
        return 0 if image == b"machine code" else 200

    def cuModuleGetFunction(self, function, module, name):
        assert module.value == 11
        self.looked_up.append(name)
        function._obj.value = 100 + len(self.looked_up)
        return 0

    def cuLaunchKernel(self, function, *rest):
        *shape, shared, stream, parameters, extra = rest
        third = ctypes.cast(parameters[1], ctypes.POINTER(ctypes.c_int)).contents.value
        self.launches.append((function.value, *shape, shared, stream.value, third, extra))
        return self.status

    def cuGetErrorName(self, status, name):
        name._obj.value = b"CUDA_ERROR_INVALID_VALUE"
        return 0


@pytest.fixture
def driver(monkeypatch):
    found = RecordingDriver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: found)
    current = []

    @contextmanager
    def device(place):
        current.append(place)
        try:
            yield
        finally:
            current.pop()

    def current_stream():
        assert current == [SECOND]
        return SimpleNamespace(cuda_stream=42, synchronize=lambda: None)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    return found


def test_a_launch_goes_to_torchs_stream_of_its_device(driver):
    kernels = DriverKernels(b"machine code", SECOND)
    for _ in range(2):
        kernels.launch("gemv_4bit_1", (7, 2, 1), (32, 4, 1), torch.zeros(1), 9)
    kernels.launch("other", (1, 1, 1), (32, 1, 1), None, 8)
    assert driver.looked_up == [b"gemv_4bit_1", b"other"]
    assert driver.launches == [(101, 7, 2, 1, 32, 4, 1, 0, 42, 9, None)] * 2 + [(102, 1, 1, 1, 32, 1, 1, 0, 42, 8, None)]


def test_machine_code_that_does_not_load_is_compiled_once_more(driver, monkeypatch):
    asked = []

    def compiled(source, capability, *, defines, anew=False):
        asked.append(anew)
        return b"machine code" if anew and repairable else b"machine"

    monkeypatch.setattr(cuda_driver, "compile_cubin", compiled)
    monkeypatch.setattr(cuda_driver, "card_of", lambda device: Card((6, 1), 28))
    repairable = True
    cuda_driver.kernels_of(SECOND, ("numbers",), ("ONCE=1",)).launch("any", (1, 1, 1), (1, 1, 1), None, 1)
    assert asked == [False, True] and len(driver.launches) == 1
    repairable = False
    with pytest.raises(RuntimeError, match="CUDA driver"):
        cuda_driver.kernels_of(SECOND, ("numbers",), ("NEVER=1",))


def test_a_launch_that_fails_is_told(driver):
    driver.status = 1
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        DriverKernels(b"machine code", SECOND).launch("any", (1, 1, 1), (1, 1, 1), None, 1)


def test_no_driver_is_one_sentence(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    cuda_driver._driver.cache_clear()
    with pytest.raises(MissingDependency, match="libcuda.so.1; install it, or choose --device cpu"):
        DriverKernels(b"machine code", SECOND)
