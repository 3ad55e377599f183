"""Which wheels, drivers and compilers carry code for which GPU, as data. Read out of the wheels themselves; nothing is probed here.

Capabilities are NVIDIA's compute capabilities, (major, minor): a GTX 1080 Ti has (6, 1).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from shlex import quote

Capability = tuple[int, int]
Version = tuple[int, ...]


@dataclass(frozen=True)
class Floor:
    """From this version on, the lowest capability that is still served."""

    version: Version
    capability: Capability


# Newest first; every list ends with what was before.
ONNXRUNTIME_GPU = (Floor((1, 27), (7, 5)), Floor((0,), (6, 0)))
"""onnxruntime-gpu's default Linux wheels: 1.27 is the first for CUDA 13."""
BITSANDBYTES = (Floor((13, 0), (7, 5)), Floor((12, 8), (7, 0)), Floor((0,), (6, 0)))
"""bitsandbytes' libraries, by the version of CUDA that torch was built with: it loads the one of that name."""
CUDNN = (Floor((9, 11), (7, 0)), Floor((0,), (0, 0)))
DRIVER = (Floor((590,), (7, 5)), Floor((0,), (0, 0)))
"""R580 is the last branch for Maxwell, Pascal and Volta."""

ONNXRUNTIME_CUDA = ((1, 27), 13, 12)
"""From that version on onnxruntime-gpu needs libraries of the first, before of the second CUDA."""
DRIVER_FOR_CUDA = {11: 450, 12: 525, 13: 580}
"""The oldest driver branch that runs what was built with a CUDA of that number."""
LAST_DRIVER_FOR_OLD_CARDS = "R580"

HALF_RATE = {(6, 1): "1/64"}
"""Where arithmetic in half precision is a small fraction of float32's rate."""
HALF_PRECISION_BITSANDBYTES = (0, 50)
"""Since then its 4-bit kernel multiplies in half precision."""

GENERATIONS = (
    ((5, 0), "Maxwell"), ((6, 0), "Pascal"), ((7, 0), "Volta"), ((7, 5), "Turing"),
    ((8, 0), "Ampere"), ((8, 9), "Ada"), ((9, 0), "Hopper"), ((10, 0), "Blackwell"),
)  # fmt: skip
PCI_DEVICES = (
    (range(0x15F0, 0x1600), (6, 0)), (range(0x1340, 0x1800), (5, 0)), (range(0x1B00, 0x1D80), (6, 1)), (range(0x1D80, 0x1E00), (7, 0)),
)  # fmt: skip
"""What a card without a working driver is, by its PCI device number: the first range that holds it. Only what R590 dropped."""


@dataclass(frozen=True)
class Ability:
    """Something vlquant can do on a GPU."""

    name: str
    lowest: Capability
    carried_by: str
    """What runs it."""
    needs: tuple[str, ...]
    """Parts that have to be sound, as findings name them."""


ABILITIES = (
    Ability("GPTQ 4 and 8 bit (own kernels)", (6, 1), "our kernels, compiled by NVRTC", ("driver", "torch", "nvrtc")),
    # bitsandbytes' own products with int8 begin at 7.5. They are not used: its codes and row scales go to our kernels.
    Ability("int8 (own kernels)", (6, 1), "our kernels, compiled by NVRTC; made with bitsandbytes, which any CPU can", ("driver", "torch", "nvrtc")),
    Ability("NF4 (bitsandbytes)", (6, 0), "bitsandbytes' kernels; made with it too, which any CPU can", ("driver", "torch", "bitsandbytes")),
    Ability("vision fp32", (6, 0), "ONNX Runtime's CUDA provider", ("driver", "torch", "cudnn", "onnxruntime")),
    Ability("vision fp16", (6, 0), "half-size weights, sums in float32", ("driver", "torch", "cudnn", "onnxruntime")),
)
CPU_ONLY = (("vision int8", "its operators are made for CPUs; on a GPU take fp32 or fp16"),)
"""What is not meant for a GPU, whichever it is."""


@dataclass(frozen=True)
class PinnedSet:
    """A file of versions that work together, and the cards it serves."""

    file: str
    lowest: Capability
    highest: Capability | None
    cuda: int
    """Major version of the CUDA its torch is built with."""
    system: str | None = None
    """The one that its wheels are for; None: any."""
    pythons: tuple[Version, Version] | None = None
    """The first and the last that its wheels are for; None: whatever vlquant takes."""

    def installs(self, python: str, system: str) -> bool:
        """Whether there are wheels for this version of Python ("3.11.7") and system ("Linux x86_64")."""
        fits = self.pythons is None or self.pythons[0] <= numbers(python)[:2] <= self.pythons[1]
        return fits and self.system in (None, system)

    def serves(self, capability: Capability, driver: Version | None) -> bool:
        """Whether its wheels have code for the card, and the driver is new enough for them; None: not known."""
        has_code = self.lowest <= capability and (self.highest is None or capability <= self.highest)
        return has_code and (driver is None or driver[0] >= DRIVER_FOR_CUDA[self.cuda])


SETS = (
    PinnedSet("cpu.txt", (7, 5), None, 13),
    PinnedSet("pascal.txt", (6, 0), (9, 0), 12, system="Linux x86_64", pythons=((3, 11), (3, 13))),
)
"""The preferred first. A CPU takes the first."""


def set_for(capabilities: Iterable[Capability], driver: Version | None, sets: Iterable[PinnedSet] = SETS) -> PinnedSet | None:
    """The first of `sets` that serves all these cards with this driver; without cards the first; None if there is none."""
    cards = tuple(capabilities)
    return next((each for each in sets if all(each.serves(card, driver) for card in cards)), None)


def install_line(pins: str, *, extra: str, sources: str | None, remove: Iterable[str] = ()) -> str:
    """The command that installs vlquant by the file `pins`, after taking `remove` out.

    sources: the folder it is built from; None: what is installed stays, and gets what it needs.
    """
    what = f"vlquant[{extra}]" if sources is None else f"{sources}[{extra}]"
    install = f"pip install {'' if sources is None else '-e '}{quote(what)} -c {quote(pins)}"
    away = " ".join(remove)
    return f"pip uninstall -y {away} && {install}" if away else install


def pinned_versions(pins: str) -> dict[str, str]:
    """Distribution to version, of one of the sets."""
    lines = (files("vlquant") / "pins" / pins).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in (each.split("#")[0].strip() for each in lines) if line)


def numbers(version: str) -> Version:
    """The numbers of a version, its local part and pre-release left out: "2.7.1+cu126" is (2, 7, 1)."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def floor_of(floors: tuple[Floor, ...], version: Version) -> Capability:
    """The lowest capability that this version serves."""
    return next(each.capability for each in floors if version >= each.version)


def generation(capability: Capability) -> str:
    """NVIDIA's name of the architecture."""
    return next((name for lowest, name in reversed(GENERATIONS) if capability >= lowest), "older than Maxwell")


def pci_capability(device: int) -> Capability | None:
    """The capability of a PCI device number, if it is one that today's drivers no longer run."""
    return next((capability for devices, capability in PCI_DEVICES if device in devices), None)


def has_code(architectures: Iterable[str], capability: Capability) -> bool:
    """Whether a build for `architectures`, as torch names them, runs on a card.

    Machine code (sm_60) runs on later cards of the same major number; an intermediate form (compute_90) on all later
    ones; with a letter (sm_90a, compute_90a) on that card alone.
    """
    return any(_runs(each, capability) for each in architectures)


def _runs(architecture: str, capability: Capability) -> bool:
    kind, _, digits = architecture.partition("_")
    major, minor, letter = re.fullmatch(r"(\d+)(\d)([a-z]?)", digits).groups()
    target = int(major), int(minor)
    if letter:
        return target == capability
    return target <= capability if kind == "compute" else target[0] == capability[0] and target[1] <= capability[1]
