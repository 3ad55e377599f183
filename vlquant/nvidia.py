"""NVIDIA's driver and the cards it runs, asked of the driver's own library; and cards that it does not run. Needs no CUDA."""

import ctypes
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
TEXT_BYTES = 96
VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    """Compute capability."""
    memory_bytes: int
    device: int | None = None
    """PCI device number; None: the driver does not tell."""


class Pci(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = [
        ("old_bus_id", ctypes.c_char * 16), *((name, ctypes.c_uint) for name in ("domain", "bus", "slot", "device", "subsystem")),
        ("bus_id", ctypes.c_char * 32),
    ]  # fmt: skip


class Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def find_driver() -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's version, None without one, and the cards it runs."""
    try:
        library = ctypes.CDLL(NVML)
    except OSError:
        return kernel_module_version(), ()
    if library.nvmlInit_v2():
        return kernel_module_version(), ()
    try:
        text, count = ctypes.create_string_buffer(TEXT_BYTES), ctypes.c_uint()
        library.nvmlSystemGetDriverVersion(text, TEXT_BYTES)
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        cards = (gpu(library, index) for index in range(count.value))
        return text.value.decode() or kernel_module_version(), tuple(card for card in cards if card is not None)
    finally:
        library.nvmlShutdown()


def gpu(library: ctypes.CDLL, index: int) -> Gpu | None:
    """One card as the driver describes it; None if it may not be asked."""
    handle, text, memory, pci = ctypes.c_void_p(), ctypes.create_string_buffer(TEXT_BYTES), Memory(), Pci()
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        or library.nvmlDeviceGetName(handle, text, TEXT_BYTES)
        or library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    if failed:
        return None
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    ask_for_pci = getattr(library, "nvmlDeviceGetPciInfo_v3", None)  # Drivers of ten years ago have none.
    told = ask_for_pci is not None and ask_for_pci(handle, ctypes.byref(pci)) == 0
    # The vendor is in the lower half.
    return Gpu(text.value.decode(), (major.value, minor.value), memory.total, pci.device >> 16 if told else None)


def kernel_module_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of a loaded kernel module, whatever the libraries beside it say."""
    try:
        found = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found and found[1]


def unseen_devices(seen: Iterable[Gpu] = (), folder: Path = Path("/sys/bus/pci/devices")) -> tuple[int, ...]:
    """PCI device numbers of NVIDIA's display cards in this machine, without those that its driver has `seen`."""
    numbers = [card.device for card in seen]
    if None in numbers:
        return ()  # Which of them these are cannot be told.
    cards = [card for card in sorted(folder.glob("*")) if read(card / "vendor") == VENDOR]
    found = Counter(int(read(card / "device"), 16) for card in cards if read(card / "class").startswith(DISPLAY_CLASS))
    return tuple((found - Counter(numbers)).elements())


def read(path: Path) -> str:
    """A file of the system's, stripped; empty if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
