"""What can be wrong with an installation, rule by rule: each looks at the facts of `vlquant.probes` and names what it finds."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from vlquant import gpu_support as support
from vlquant.gpu_support import Capability, Version, numbers
from vlquant.nvidia import Gpu
from vlquant.probes import Probes

BROKEN, UNUSED, SLOW, NOTE = "broken", "unused", "slow", "note"
"""Installed and cannot work; a card that what is installed leaves aside; works at a fraction of its speed; worth knowing."""
EVERYTHING = "all"
"""The part of a finding that stands in the way of whatever a card could do."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    severity: str
    part: str
    """What it is about: "driver", "torch", "cudnn", "onnxruntime", "bitsandbytes", "nvrtc" and so on."""
    sentence: str
    why: str
    mend: str | None = None
    """The command, or the act, that puts it right."""
    replace: tuple[str, ...] = ()
    """Distributions that this command takes out and installs anew."""
    card: str | None = None
    """The one card it concerns; None: whatever there is."""


def libraries_load(probes: Probes) -> Iterator[Finding]:
    """Whatever the machine: libraries that are installed and do not work on the CPU, and torch, without which nothing does."""
    if probes.torch is None and "torch" not in probes.problems:
        yield Finding(BROKEN, "torch", "torch is not installed", "every command computes with it", **anew(probes))
    for probe, part in {"torch": "torch", "onnxruntime": "onnxruntime", "onnxruntime on cpu": "onnxruntime", "bitsandbytes": "bitsandbytes",
                        "cpu kernels": "cpu kernels", "nvrtc": "nvrtc"}.items():  # fmt: skip
        if probe in probes.problems and not (probe != "torch" and "torch" in probes.problems):
            yield Finding(BROKEN, part, f"{probe} does not work", probes.problems[probe], **anew(probes, part))


def one_onnxruntime(probes: Probes) -> Iterator[Finding]:
    """Exactly one of the two packages."""
    both = [f"{name} {probes.versions[name]}" for name in ("onnxruntime", "onnxruntime-gpu") if name in probes.versions]
    if len(both) == 2:
        why = "both are the same module: files of one lie over those of the other, and removing one breaks both"
        yield Finding(BROKEN, "onnxruntime", f"{both[0]} and {both[1]} are installed together", why, **anew(probes, "onnxruntime"))
    if not both:
        why = "without it the vision tower runs in torch only (--vision torch), and export-vision cannot test what it writes"
        yield Finding(NOTE, "onnxruntime", "ONNX Runtime is not installed", why, **anew(probes))


def driver_runs(probes: Probes) -> Iterator[Finding]:
    """Cards that the driver does not run, or will not run what is installed."""
    yield from map(partial(unseen_card, probes), probes.unseen)
    cuda = probes.torch and probes.torch.cuda
    needed = support.DRIVER_FOR_CUDA.get(numbers(cuda)[0]) if cuda else None
    if probes.gpus and probes.driver and needed and numbers(probes.driver)[0] < needed:
        older_cuda = support.set_for((gpu.capability for gpu in probes.gpus), driver_of(probes))
        replacement = anew(probes, "torch")
        lines = [f"install a driver of branch R{needed} or later", *([replacement["mend"]] if older_cuda else [])]
        why = f"CUDA {numbers(cuda)[0]} needs branch R{needed}"
        yield Finding(BROKEN, "driver", f"driver {probes.driver} is too old for torch's CUDA {cuda}", why, ", or: ".join(lines))
    for gpu in probes.gpus:
        if probes.driver and gpu.capability < support.floor_of(support.DRIVER, numbers(probes.driver)):
            yield old_card(gpu.name, probes.driver, gpu.name)


def unseen_card(probes: Probes, device: int) -> Finding:
    """A card in this machine that no driver runs."""
    capability = support.pci_capability(device)
    name = f"the NVIDIA card {device:04x}" + (f" ({support.generation(capability)})" if capability else "")
    if probes.driver is None:
        branch = support.LAST_DRIVER_FOR_OLD_CARDS if capability else "R580 or later"
        return Finding(UNUSED, "driver", f"{name} has no driver", "no NVIDIA driver is loaded", f"install NVIDIA's driver, branch {branch}")
    if capability and capability < support.floor_of(support.DRIVER, numbers(probes.driver)):
        return old_card(name, probes.driver)
    why = f"driver {probes.driver} is loaded and lists no card"
    return Finding(BROKEN, "driver", f"{name} is not seen by its driver", why, "look into the system's log for what the driver says")


def old_card(name: str, driver: str, card_name: str | None = None) -> Finding:
    """A driver that came after the card's last one."""
    last = support.LAST_DRIVER_FOR_OLD_CARDS
    return Finding(BROKEN, "driver", f"driver {driver} no longer runs {name}", f"{last} is the last branch for Maxwell, Pascal and Volta",
                   f"install NVIDIA's driver, branch {last}", card=card_name)  # fmt: skip


def a_set_serves(probes: Probes) -> Iterator[Finding]:
    """Cards for which there is no pinned set at all."""
    for gpu in probes.gpus:
        if support.set_for([gpu.capability], None) is None:
            why = f"compute capability {dotted(gpu.capability)} is below {dotted(min(each.lowest for each in support.SETS))}"
            yield Finding(UNUSED, EVERYTHING, f"no set of today's wheels has code for {gpu.name}; the CPU runs instead", why, card=gpu.name)


def torch_has_code(probes: Probes) -> Iterator[Finding]:
    """torch, on each card."""
    torch = probes.torch
    if torch is None or not served(probes):
        return
    version = f"torch {probes.versions.get('torch', '')}".strip()
    if torch.cuda is None:
        yield Finding(UNUSED, "torch", f"{version} is a build for CPUs", "the GPU lies idle", **anew(probes, "torch"))
        return
    lacking = [gpu for gpu in served(probes) if not support.has_code(torch.architectures, gpu.capability)]
    for gpu in lacking:
        why = f"it has {' '.join(torch.architectures) or 'none at all'}; the card is {of(gpu)}"
        yield Finding(BROKEN, "torch", f"{version} (CUDA {torch.cuda}) has no code for {gpu.name}", why, card=gpu.name, **anew(probes, "torch"))
    if not lacking and "torch on cuda" in probes.problems:
        yield Finding(BROKEN, "torch", f"{version} does not compute on the GPU", probes.problems["torch on cuda"], **anew(probes, "torch"))


def cudnn_has_code(probes: Probes) -> Iterator[Finding]:
    """cuDNN: torch's, and what pip has put beside it, which ONNX Runtime takes."""
    found = {"nvidia-cudnn": probes.versions[name] for name in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13") if name in probes.versions}
    if probes.torch and probes.torch.cudnn:
        found["torch"] = cudnn_text(probes.torch.cudnn)
    for gpu in served(probes):
        late = {f"{text} ({place})" for place, text in found.items() if gpu.capability < support.floor_of(support.CUDNN, numbers(text))}
        if late:
            why = f"9.10 is its last for {support.generation(gpu.capability)}; later ones fail with CUDNN_STATUS_EXECUTION_FAILED"
            yield Finding(BROKEN, "cudnn", f"cuDNN {', '.join(sorted(late))} has no code for {gpu.name}", why, card=gpu.name,
                          **anew(probes, "torch", *(name for name in probes.versions if name.startswith("nvidia-cudnn"))))  # fmt: skip


def onnxruntime_has_code(probes: Probes) -> Iterator[Finding]:
    """ONNX Runtime's CUDA provider: there, with code for each card, and really loading."""
    if not served(probes) or not probes.providers:
        return
    version = probes.versions.get("onnxruntime-gpu")
    if "CUDAExecutionProvider" not in probes.providers:
        why = "it has no CUDA provider; the vision tower would run on the CPU"
        yield Finding(UNUSED, "onnxruntime", "the installed onnxruntime is a build for CPUs", why, **anew(probes, "onnxruntime"))
        return
    lacking = [gpu for gpu in served(probes) if version and gpu.capability < support.floor_of(support.ONNXRUNTIME_GPU, numbers(version))]
    for gpu in lacking:
        lowest = dotted(support.floor_of(support.ONNXRUNTIME_GPU, numbers(version)))
        why = f"its code begins at {lowest}; the card is {of(gpu)}"
        yield Finding(BROKEN, "onnxruntime", f"onnxruntime-gpu {version} has no code for {gpu.name}", why, card=gpu.name, **anew(probes, "onnxruntime"))
    if not lacking and "CUDAExecutionProvider" not in probes.ran:
        why = probes.problems.get("onnxruntime on cuda", "the graph ran on another provider") + other_cuda(probes)
        yield Finding(BROKEN, "onnxruntime", "ONNX Runtime lists its CUDA provider, which does not load", why, **anew(probes, "onnxruntime"))


def other_cuda(probes: Probes) -> str:
    """The commonest reason, where it applies."""
    version, cuda = probes.versions.get("onnxruntime-gpu"), probes.torch and probes.torch.cuda
    since, later, before = support.ONNXRUNTIME_CUDA
    wanted = None if version is None else later if numbers(version) >= since else before
    if wanted is None or not cuda or numbers(cuda)[0] == wanted:
        return ""
    return f"; onnxruntime-gpu {version} needs libraries of CUDA {wanted}, and torch brings {cuda}"


def bitsandbytes_has_code(probes: Probes) -> Iterator[Finding]:
    """bitsandbytes loads the library that is named after torch's CUDA."""
    version, cuda = probes.versions.get("bitsandbytes"), probes.torch and probes.torch.cuda
    if version is None or not cuda:
        return
    lowest = support.floor_of(support.BITSANDBYTES, numbers(cuda))
    lacking = [gpu for gpu in served(probes) if gpu.capability < lowest]
    for gpu in lacking:
        picked = probes.bitsandbytes or f"its library for CUDA {cuda}"
        why = f"torch's CUDA {cuda} makes it load that one, whose code begins at {dotted(lowest)}; the card is {of(gpu)}"
        sentence = f"bitsandbytes {version} picks {picked}, without code for {gpu.name}"
        yield Finding(BROKEN, "bitsandbytes", sentence, why, card=gpu.name, **anew(probes, "torch", "bitsandbytes"))
    if served(probes) and not lacking and "bitsandbytes on cuda" in probes.problems:
        why = probes.problems["bitsandbytes on cuda"]
        yield Finding(BROKEN, "bitsandbytes", f"bitsandbytes {version} does not work on the GPU", why, **anew(probes, "bitsandbytes"))
    for gpu in served(probes):
        if gpu.capability in support.HALF_RATE and numbers(version) >= support.HALF_PRECISION_BITSANDBYTES:
            why = f"its 4-bit kernel multiplies in half precision, which {gpu.name} does at {support.HALF_RATE[gpu.capability]} of float32's rate"
            yield Finding(SLOW, "bitsandbytes", f"bitsandbytes {version} is slow on {gpu.name}", why, card=gpu.name, **anew(probes, "bitsandbytes"))


def nvrtc_compiles(probes: Probes) -> Iterator[Finding]:
    """The compiler of our CUDA kernels."""
    if not served(probes) or not (probes.torch and probes.torch.cuda):
        return
    if probes.nvrtc is None and "nvrtc" not in probes.problems:
        yield Finding(UNUSED, "nvrtc", "NVRTC is not installed", "the kernels for packed weights cannot be compiled", **anew(probes, "torch"))
    for gpu in served(probes):
        if probes.nvrtc and gpu.capability < divmod(min(probes.nvrtc.architectures), 10):
            why = f"{probes.nvrtc.library} compiles for {dotted(divmod(min(probes.nvrtc.architectures), 10))} and later"
            yield Finding(BROKEN, "nvrtc", f"NVRTC {probes.nvrtc.version} cannot compile for {gpu.name}", why, card=gpu.name, **anew(probes, "torch"))


RULES = (
    libraries_load, one_onnxruntime, driver_runs, a_set_serves, torch_has_code, cudnn_has_code, onnxruntime_has_code,
    bitsandbytes_has_code, nvrtc_compiles,
)  # fmt: skip
"""In the order in which they are told and stand in a card's way."""


def anew(probes: Probes, *parts: str) -> dict:
    """How a finding is mended: by installing everything as this machine needs it, `parts` that pip would keep taken out first."""
    distributions = [name for part in parts for name in ((part, f"{part}-gpu") if part == "onnxruntime" else (part,))]
    remove = tuple(name for name in dict.fromkeys(distributions) if name in probes.versions)
    return {"mend": next(iter(install_lines(probes, remove=remove))), "replace": remove}


def served(probes: Probes) -> list[Gpu]:
    """The cards for which there is a pinned set; what is installed is not to blame for the others."""
    return [gpu for gpu in probes.gpus if support.set_for([gpu.capability], None)]


def install_lines(probes: Probes, remove: tuple[str, ...] = ()) -> Iterator[str]:
    """What would give this machine a working vlquant: one line, or one for each card where no set serves all."""
    unseen = filter(None, map(support.pci_capability, probes.unseen))
    capabilities = [card for card in [gpu.capability for gpu in probes.gpus] or unseen if support.set_for([card], None)]
    for cards in [capabilities] if support.set_for(capabilities, driver_of(probes)) else [[each] for each in capabilities]:
        # A driver that is too old for every set is told by its own finding.
        chosen = support.set_for(cards, driver_of(probes)) or support.set_for(cards, None)
        yield support.install_line(chosen.file, extra="gpu" if cards else "cpu", remove=remove)


def driver_of(probes: Probes) -> Version | None:
    """The driver's version as numbers."""
    return numbers(probes.driver) if probes.driver else None


def dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def of(gpu: Gpu) -> str:
    """A card's capability with its architecture."""
    return f"{dotted(gpu.capability)} ({support.generation(gpu.capability)})"


def cudnn_text(number: int) -> str:
    """cuDNN's count as a version: 90501 is 9.5.1, and 8905 of before was 8.9.5."""
    thousand = 10_000 if number >= 90_000 else 1_000
    return f"{number // thousand}.{number % thousand // 100}.{number % 100}"
