"""What can be wrong with an installation, rule by rule: each looks at the facts of `vlquant.probes` and names what it finds."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from shlex import quote

from vlquant import gpu_support as support
from vlquant.gpu_support import Capability, PinnedSet, Version, numbers
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


@dataclass(frozen=True)
class Install:
    """A way to a working vlquant."""

    command: str
    cards: tuple[str, ...]
    """That it serves; none: the CPU."""


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
        older_cuda = support.set_for((gpu.capability for gpu in probes.gpus), driver_of(probes), sets_here(probes))
        replacement = anew(probes, "torch")
        lines = [f"install a driver of branch R{needed} or later", *([replacement["mend"]] if older_cuda else [])]
        why = f"CUDA {numbers(cuda)[0]} needs branch R{needed}"
        yield Finding(BROKEN, "driver", f"driver {probes.driver} is too old for torch's CUDA {cuda}", why, ", or: ".join(lines))
    for gpu in probes.gpus:
        if probes.driver and gpu.capability < support.floor_of(support.DRIVER, numbers(probes.driver)):
            yield old_card(gpu.name, probes.driver)


def unseen_card(probes: Probes, device: int) -> Finding:
    """A card in this machine that no driver runs."""
    capability = support.pci_capability(device)
    name = f"the NVIDIA card {device:04x}" + (f" ({support.generation(capability)})" if capability else "")
    if probes.driver is None:
        branch = support.LAST_DRIVER_FOR_OLD_CARDS if capability else "R580 or later"
        mend = f"install NVIDIA's driver, branch {branch}"
        return Finding(UNUSED, "driver", f"{name} has no driver", "no NVIDIA driver is loaded", mend, card=name)
    if capability and capability < support.floor_of(support.DRIVER, numbers(probes.driver)):
        return old_card(name, probes.driver)
    log, sentence = "look into the system's log for what the driver says", f"{name} is not seen by its driver"
    if probes.gpus:
        why = f"driver {probes.driver} lists others only; it may be given to another program, or be kept from this container"
        return Finding(NOTE, "driver", sentence, why, log, card=name)
    return Finding(BROKEN, "driver", sentence, f"driver {probes.driver} is loaded and lists no card", log, card=name)


def old_card(name: str, driver: str) -> Finding:
    """A driver that came after the card's last one."""
    last = support.LAST_DRIVER_FOR_OLD_CARDS
    return Finding(BROKEN, "driver", f"driver {driver} no longer runs {name}", f"{last} is the last branch for Maxwell, Pascal and Volta",
                   f"install NVIDIA's driver, branch {last}", card=name)  # fmt: skip


def a_set_serves(probes: Probes) -> Iterator[Finding]:
    """Cards for which there is no pinned set at all."""
    for gpu in probes.gpus:
        if support.set_for([gpu.capability], None) is None:
            why = f"compute capability {dotted(gpu.capability)} is below {dotted(min(each.lowest for each in support.SETS))}"
            yield Finding(UNUSED, EVERYTHING, f"no set of today's wheels has code for {gpu.name}; the CPU runs instead", why, card=gpu.name)
        elif support.set_for([gpu.capability], None, sets_here(probes)) is None:
            chosen = support.set_for([gpu.capability], None)
            first, last = map(dotted, chosen.pythons)
            why = f"{chosen.file} is made of wheels for {chosen.system} and Python {first} to {last}; this is Python {probes.python} on {probes.system}"
            yield Finding(NOTE, "pins", f"the pinned versions for {gpu.name} cannot be installed here", why,
                          f"make an environment of such a Python, on {chosen.system}", card=gpu.name)  # fmt: skip


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
        sentence = f"{version} (CUDA {torch.cuda}) has no code for {gpu.name}"
        yield Finding(BROKEN, "torch", sentence, why, card=gpu.name, **anew(probes, "torch", card=gpu))
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
                          **anew(probes, "torch", *(name for name in probes.versions if name.startswith("nvidia-cudnn")), card=gpu))  # fmt: skip


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
        sentence = f"onnxruntime-gpu {version} has no code for {gpu.name}"
        yield Finding(BROKEN, "onnxruntime", sentence, why, card=gpu.name, **anew(probes, "onnxruntime", card=gpu))
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
        yield Finding(BROKEN, "bitsandbytes", sentence, why, card=gpu.name, **anew(probes, "torch", "bitsandbytes", card=gpu))
    if served(probes) and not lacking and "bitsandbytes on cuda" in probes.problems:
        why = probes.problems["bitsandbytes on cuda"]
        yield Finding(BROKEN, "bitsandbytes", f"bitsandbytes {version} does not work on the GPU", why, **anew(probes, "bitsandbytes"))
    for gpu in served(probes):
        if gpu.capability in support.HALF_RATE and numbers(version) >= support.HALF_PRECISION_BITSANDBYTES:
            why = f"its 4-bit kernel multiplies in half precision, which {gpu.name} does at {support.HALF_RATE[gpu.capability]} of float32's rate"
            sentence = f"bitsandbytes {version} is slow on {gpu.name}"
            yield Finding(SLOW, "bitsandbytes", sentence, why, card=gpu.name, **anew(probes, "bitsandbytes", card=gpu))


def nvrtc_compiles(probes: Probes) -> Iterator[Finding]:
    """The compiler of our CUDA kernels."""
    if not served(probes) or not (probes.torch and probes.torch.cuda):
        return
    if not probes.nvrtc and "nvrtc" not in probes.problems:
        yield Finding(UNUSED, "nvrtc", "NVRTC is not installed", "the kernels for packed weights cannot be compiled", **anew(probes, "torch"))
    for gpu in served(probes):
        known = [each.architectures for each in probes.nvrtc]
        if known and not any(10 * gpu.capability[0] + gpu.capability[1] in each for each in known):
            versions = " and ".join(each.version for each in probes.nvrtc)
            reach = " and ".join(f"{dotted(divmod(min(each), 10))} to {dotted(divmod(max(each), 10))}" for each in known)
            why = f"{' and '.join(each.library for each in probes.nvrtc)} compiles for {reach}; the card is {of(gpu)}"
            yield Finding(BROKEN, "nvrtc", f"NVRTC {versions} cannot compile for {gpu.name}", why, card=gpu.name, **anew(probes, "torch", card=gpu))


def cpu_kernels_are_there(probes: Probes) -> Iterator[Finding]:
    """What makes a CPU fast: compiled when vlquant is installed, for processors with AVX2."""
    if probes.cpu_kernels is None and "cpu kernels" not in probes.problems and "AVX2" in (probes.cpu.instructions or ()):
        steps = [] if probes.compiler else ["install a C compiler (gcc or clang, with the headers of Python)"]
        sources = probes.place.sources
        steps.append("install vlquant again from its sources" if sources is None else f"pip install --no-deps -e {quote(sources)}")
        why = "decoding runs in torch, several times slower; they are built when vlquant is installed and a C compiler is there"
        yield Finding(SLOW, "cpu kernels", "the CPU kernels are not compiled", why, ", then: ".join(steps))


def the_choice_of_kernels_is_one(probes: Probes) -> Iterator[Finding]:
    """VLQUANT_KERNELS, by which whatever runs a decoder on the CPU is refused if it asks for what there is not."""
    asked, choices = probes.kernels_asked, ("torch", *probes.kernel_choices)
    if asked and asked not in choices:
        why = "whatever runs or plans a decoder on the CPU is refused because of it; "
        why += f"this installation takes {', '.join(choices)}"
        yield Finding(BROKEN, "cpu kernels", f"the environment variable VLQUANT_KERNELS is {asked!r}", why, "unset VLQUANT_KERNELS")


RULES = (
    libraries_load, one_onnxruntime, driver_runs, a_set_serves, torch_has_code, cudnn_has_code, onnxruntime_has_code,
    bitsandbytes_has_code, nvrtc_compiles, cpu_kernels_are_there, the_choice_of_kernels_is_one,
)  # fmt: skip
"""In the order in which they are told and stand in a card's way."""


def anew(probes: Probes, *parts: str, card: Gpu | None = None) -> dict:
    """How a finding is mended: by installing everything as `card` needs it, `parts` that pip would keep taken out first.

    None: as this machine needs it, of several ways each.
    """
    distributions = [name for part in parts for name in ((part, f"{part}-gpu") if part == "onnxruntime" else (part,))]
    remove = tuple(name for name in dict.fromkeys(distributions) if name in probes.versions)
    ways = [each for each in installs(probes, remove=remove) if card is None or not each.cards or card.name in each.cards]
    if card is not None and support.set_for([card.capability], None, sets_here(probes)) is None:
        ways = []
    if len(ways) > 1:
        return {"mend": "; or ".join(f"for {' and '.join(each.cards)}: {each.command}" for each in ways), "replace": remove}
    return {"mend": ways[0].command if ways else None, "replace": remove}


def served(probes: Probes) -> list[Gpu]:
    """The cards for which there is a pinned set; what is installed is not to blame for the others."""
    return [gpu for gpu in probes.gpus if support.set_for([gpu.capability], None)]


def installs(probes: Probes, remove: tuple[str, ...] = ()) -> Iterator[Install]:
    """What would give this machine a working vlquant: one way, or one for each card where no set serves all."""
    sets, driver = sets_here(probes), driver_of(probes)
    cards = {gpu.name: gpu.capability for gpu in probes.gpus}
    cards = cards or {f"{device:04x}": capability for device in probes.unseen if (capability := support.pci_capability(device))}
    cards = {name: capability for name, capability in cards.items() if support.set_for([capability], None, sets)}
    together = support.set_for(cards.values(), driver, sets)
    # A driver that is too old for every set is told by its own finding.
    own = {name: support.set_for([card], driver, sets) or support.set_for([card], None, sets) for name, card in cards.items()}
    for chosen in [together] if together else dict.fromkeys(own.values()):
        names = tuple(name for name in cards if together or own[name] == chosen)
        pins = f"{probes.place.pins}/{chosen.file}"
        line = support.install_line(pins, extra="gpu" if names else "cpu", sources=probes.place.sources, remove=remove)
        yield Install(line, names)


def sets_here(probes: Probes) -> list[PinnedSet]:
    """The pinned sets whose wheels are for this system and Python."""
    return [each for each in support.SETS if each.installs(probes.python, probes.system)]


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
