"""A machine's facts as lines that people read: name and value."""

from collections.abc import Iterator

from vlquant.counting import counted
from vlquant.doctor_rules import cudnn_text, dotted
from vlquant.probes import Cpu, Probes

TOLD_ELSEWHERE = {"torch", "onnxruntime", "onnxruntime-gpu", "bitsandbytes"}


def facts(probes: Probes) -> Iterator[tuple[str, str]]:
    """Name and value of everything that decides what can run, installed or missing."""
    yield "Python", f"{probes.python}, {probes.system}"
    yield "processor", cpu_text(probes.cpu)
    yield "driver", probes.driver or "none"
    for gpu in probes.gpus:
        yield "GPU", f"{gpu.name}, compute capability {dotted(gpu.capability)}, {gpu.memory_bytes / 1e9:.1f} GB"
    yield "torch", torch_text(probes)
    yield "ONNX Runtime", onnxruntime_text(probes)
    yield "bitsandbytes", bitsandbytes_text(probes)
    yield "NVRTC", ", ".join(f"{each.version} ({each.library})" for each in probes.nvrtc) or "none"
    yield "C compiler", probes.compiler or "none"
    yield "CPU kernels", kernels_text(probes)
    yield "also installed", ", ".join(f"{name} {version}" for name, version in probes.versions.items() if name not in TOLD_ELSEWHERE)


def cpu_text(cpu: Cpu) -> str:
    instructions = "instructions not told" if cpu.instructions is None else " ".join(cpu.instructions) or "no AVX2"
    memory = f", {cpu.memory_bytes / 1e9:.1f} GB" if cpu.memory_bytes else ""
    return f"{cpu.name}, {counted(cpu.cores, 'core')}{memory}, {instructions}"


def kernels_text(probes: Probes) -> str:
    file, asked = probes.cpu_kernels or "not compiled", probes.kernels_asked
    if not asked:
        return file
    off = "switched off, as " if asked == "torch" else ""
    return f"{file}, {off}the environment variable VLQUANT_KERNELS is {asked}"


def torch_text(probes: Probes) -> str:
    version = probes.versions.get("torch", "not installed")
    if probes.torch is None:
        return f"{version}, does not load" if "torch" in probes.problems else version
    if probes.torch.cuda is None:
        return f"{version}, for CPUs"
    cudnn = f", cuDNN {cudnn_text(probes.torch.cudnn)}" if probes.torch.cudnn else ""
    return f"{version}, CUDA {probes.torch.cuda}{cudnn}, code for {' '.join(probes.torch.architectures) or 'no card'}"


def onnxruntime_text(probes: Probes) -> str:
    installed = [f"{name} {probes.versions[name]}" for name in ("onnxruntime", "onnxruntime-gpu") if name in probes.versions]
    return f"{' and '.join(installed)}, a graph ran on {' and '.join(probes.ran) or 'nothing'}" if installed else "not installed"


def bitsandbytes_text(probes: Probes) -> str:
    if "bitsandbytes" not in probes.versions:
        return "not installed"
    state = "does not work" if "bitsandbytes" in probes.problems else probes.bitsandbytes or "without a library of its own"
    return f"{probes.versions['bitsandbytes']}, {state}"
