"""What this machine is and what is installed on it: facts alone, judged by `vlquant.doctor`.

Every library is loaded in a process of its own, so that a broken one is a fact as well.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from vlquant.machine import physical_memory, processor_and_flags, usable_cores
from vlquant.nvidia import Gpu, find_driver, unseen_devices

DISTRIBUTIONS = (
    "vlquant", "torch", "onnxruntime", "onnxruntime-gpu", "bitsandbytes", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "numpy",
    "onnx", "transformers",
)  # fmt: skip
INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "avx512_bf16": "AVX512-BF16"}
"""Those that kernels on a CPU choose by, as Linux calls them."""
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 180
"""After which a library counts as one that does not load."""


@dataclass(frozen=True)
class Cpu:
    name: str
    instructions: tuple[str, ...] | None
    """Which of INSTRUCTIONS it has; None: this system does not tell."""
    cores: int
    """Logical ones that this process may use."""
    memory_bytes: int | None


@dataclass(frozen=True)
class TorchBuild:
    cuda: str | None
    """Version of CUDA it is built with; None: for a CPU."""
    architectures: tuple[str, ...] = ()
    cudnn: int | None = None
    """As cuDNN counts: 90501 is 9.5.1."""


@dataclass(frozen=True)
class Nvrtc:
    library: str
    version: str
    architectures: tuple[int, ...]
    """61 is compute capability 6.1."""


@dataclass(frozen=True)
class Place:
    """Where vlquant itself is."""

    sources: str | None = "."
    """Folder that pip builds it from; None: it was installed without them."""
    pins: str = "vlquant/pins"


@dataclass(frozen=True)
class Probes:
    """Everything about a machine that decides what vlquant can do there."""

    python: str
    system: str
    cpu: Cpu
    versions: Mapping[str, str]
    """Installed distributions of DISTRIBUTIONS."""
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    """Cards the driver runs."""
    unseen: tuple[int, ...] = ()
    """PCI device numbers of NVIDIA cards in this machine that it does not."""
    torch: TorchBuild | None = None
    providers: tuple[str, ...] = ()
    """What ONNX Runtime was built with."""
    ran: tuple[str, ...] = ()
    """Providers that a graph really ran on."""
    bitsandbytes: str | None = None
    """The library it picked; None: it does without."""
    nvrtc: tuple[Nvrtc, ...] = ()
    """In the order in which the runtime tries them."""
    compiler: str | None = None
    """The C compiler's command."""
    cpu_kernels: str | None = None
    """File of the compiled CPU kernels."""
    kernel_choices: tuple[str, ...] = ()
    """What VLQUANT_KERNELS may ask of them on this processor."""
    kernels_asked: str = ""
    """What it does ask for; empty: nothing."""
    place: Place = Place()
    problems: Mapping[str, str] = field(default_factory=dict)
    """Why a probe of `vlquant.library_probes` failed, by its name."""


def probe_machine() -> Probes:
    """Look at this machine. Takes some seconds, and writes nothing."""
    versions = installed_versions()
    driver, gpus = find_driver()
    answers, problems = ask_libraries(wanted_probes(versions, has_gpu=bool(gpus)))
    torch = answers.get("torch")
    ran = [answers[name]["provider"] for name in ("onnxruntime on cuda", "onnxruntime on cpu") if name in answers]
    return Probes(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=find_cpu(),
        versions=versions,
        driver=driver,
        gpus=gpus,
        unseen=unseen_devices(gpus),
        torch=torch and TorchBuild(torch["cuda"], tuple(torch["architectures"]), torch["cudnn"]),
        providers=tuple((answers.get("onnxruntime") or {}).get("providers", ())),
        ran=tuple(ran),
        bitsandbytes=(answers.get("bitsandbytes on cuda") or answers.get("bitsandbytes") or {}).get("library"),
        nvrtc=tuple(Nvrtc(each["library"], each["version"], tuple(each["architectures"])) for each in answers.get("nvrtc") or ()),
        compiler=next((name for name in (os.environ.get("CC"), *COMPILERS) if name and shutil.which(name)), None),
        cpu_kernels=(answers.get("cpu kernels") or {}).get("file"),
        kernel_choices=tuple((answers.get("cpu kernels") or {}).get("choices", ())),
        kernels_asked=os.environ.get("VLQUANT_KERNELS", ""),
        place=find_place(),
        problems=problems,
    )


def find_place() -> Place:
    """The folders of this package, told from where the command runs if they are below."""
    pins = Path(str(files("vlquant"))) / "pins"
    sources = pins.parents[1] if (pins.parents[1] / "pyproject.toml").is_file() else None
    return Place(None if sources is None else near(sources), near(pins))


def near(folder: Path) -> str:
    """A folder below this one by its relative path, any other by its whole one."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def installed_versions() -> dict[str, str]:
    """The versions of DISTRIBUTIONS, without importing them."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def wanted_probes(versions: Mapping[str, str], *, has_gpu: bool) -> list[str]:
    """Which libraries are there to be asked; on a GPU only where there is one."""
    installed = {"onnxruntime" if name == "onnxruntime-gpu" else name for name in versions}
    on_cpu = {"torch": ["torch"], "onnxruntime": ["onnxruntime", "onnxruntime on cpu"], "bitsandbytes": ["bitsandbytes"]}
    on_cuda = {"torch": ["torch on cuda"], "onnxruntime": ["onnxruntime on cuda"], "bitsandbytes": ["bitsandbytes on cuda"]}
    asked = (on_cpu, on_cuda) if has_gpu else (on_cpu,)
    return ["nvrtc", "cpu kernels", *(name for probes in asked for library in probes if library in installed for name in probes[library])]


def ask_libraries(names: Iterable[str]) -> tuple[dict[str, dict | None], dict[str, str]]:
    """The answers of the probes that could be made, and why the others could not."""
    names, started = list(names), []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        try:
            outcomes = dict(zip(names, threads.map(partial(ask_library, started=started), names), strict=True))
        except BaseException:  # Told to end: a library that hangs would be waited for.
            threads.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.kill()
            raise
    answers = {name: answer for name, (answer, problem) in outcomes.items() if problem is None}
    return answers, {name: problem for name, (_, problem) in outcomes.items() if problem is not None}


def ask_library(name: str, *, started: list[subprocess.Popen] | None = None) -> tuple[dict | None, str | None]:
    """One probe in a process of its own, which is put into `started`: its answer, or why there is none."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(probe_command(name), text=True, errors="replace", **pipes) as process:
        if started is not None:
            started.append(process)
        try:
            output, problem = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return None, f"no answer within {SECONDS} seconds"
    if process.returncode == 0:
        return json.loads(output.splitlines()[-1]), None
    return None, reason_of(process.returncode, problem)


def probe_command(name: str) -> list[str]:
    return [sys.executable, "-m", "vlquant.library_probes", name]


def reason_of(exit_code: int, standard_error: str) -> str:
    """Why a process ended with an error, in a line: its last words, and a library that it could not load."""
    if exit_code < 0:
        return f"its process was ended by {signal.Signals(-exit_code).name}"
    last = (standard_error.strip().splitlines() or [f"exit code {exit_code}"])[-1].strip()
    # ONNX Runtime's error says that a provider did not start; the reason is in its log.
    not_loaded = re.search(r"Failed to load library .*?with error: (.*)", standard_error)
    return f"{last} ({not_loaded[1].strip()})" if not_loaded else last


def find_cpu() -> Cpu:
    """The processor and memory, as Linux tells them, or less elsewhere."""
    processor, flags = processor_and_flags()
    known = tuple(word for flag, word in INSTRUCTIONS.items() if flag in flags) if flags else None
    return Cpu(processor, known, usable_cores(), physical_memory())
