"""Machines that we do not have, as `vlquant.probes` would find them. What their wheels hold is from the wheels themselves."""

from dataclasses import replace

from vlquant.nvidia import Gpu
from vlquant.probes import Cpu, Nvrtc, Probes, TorchBuild

CARDS = {
    "1080 Ti": Gpu("NVIDIA GeForce GTX 1080 Ti", (6, 1), 11_720_000_000),
    "P40": Gpu("Tesla P40", (6, 1), 24_000_000_000),
    "P100": Gpu("Tesla P100-PCIE-16GB", (6, 0), 17_100_000_000),
    "970": Gpu("NVIDIA GeForce GTX 970", (5, 2), 4_200_000_000),
    "T4": Gpu("Tesla T4", (7, 5), 15_800_000_000),
    "3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 25_400_000_000),
    "5090": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 34_200_000_000),
    "H200": Gpu("NVIDIA H200", (9, 0), 150_000_000_000),
}
CUDA126 = TorchBuild("12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"), 90501)
CUDA128 = TorchBuild("12.8", ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), 91002)
CUDA130 = TorchBuild("13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), 91900)
CUDA132 = TorchBuild("13.2", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), 92600)
NVRTC12 = (Nvrtc("libnvrtc.so.12", "12.6", (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)),)
NVRTC13 = (Nvrtc("libnvrtc.so.13", "13.0", (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)),)
PASCAL_VERSIONS = {
    "vlquant": "0.1.0", "torch": "2.7.1", "onnxruntime-gpu": "1.23.2", "bitsandbytes": "0.49.2", "nvidia-cudnn-cu12": "9.5.1.17",
}  # fmt: skip
TODAY_VERSIONS = {"vlquant": "0.1.0", "torch": "2.13.0", "onnxruntime-gpu": "1.31.1", "bitsandbytes": "0.50.2", "nvidia-cudnn-cu13": "9.19.0.56"}
BOTH_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")

NO_GPU = Probes(
    python="3.11.7",
    system="Linux x86_64",
    cpu=Cpu("a processor", ("AVX2",), 2, 25_300_000_000),
    versions={"vlquant": "0.1.0", "torch": "2.13.0+cpu", "onnxruntime": "1.31.1", "bitsandbytes": "0.50.2"},
    torch=TorchBuild(None),
    providers=("CPUExecutionProvider",),
    ran=("CPUExecutionProvider",),
    bitsandbytes="libbitsandbytes_cpu.so",
    compiler="cc",
    cpu_kernels="_kernels.abi3.so",
)


def pascal_set(card: str, **changes) -> Probes:
    """A card with everything as pins/pascal.txt has it, but for the changes."""
    healthy = replace(
        NO_GPU, versions=PASCAL_VERSIONS, driver="580.159.03", gpus=(CARDS[card],), torch=CUDA126, nvrtc=NVRTC12,
        providers=("TensorrtExecutionProvider", *BOTH_PROVIDERS), ran=BOTH_PROVIDERS, bitsandbytes="libbitsandbytes_cuda126.so",
    )  # fmt: skip
    return changed(healthy, **changes)


def todays_set(card: str, **changes) -> Probes:
    """A card with today's wheels, as pins/cpu.txt with the extra for GPUs brings them, but for the changes."""
    healthy = replace(
        pascal_set(card), versions=TODAY_VERSIONS, torch=CUDA130, nvrtc=NVRTC13, bitsandbytes="libbitsandbytes_cuda130.so"
    )  # fmt: skip
    return changed(healthy, **changes)


def changed(machine: Probes, *, versions: dict[str, str] | None = None, **changes) -> Probes:
    """The machine with other facts; of the installed versions those that are named change."""
    return replace(machine, versions={**machine.versions, **(versions or {})}, **changes)
