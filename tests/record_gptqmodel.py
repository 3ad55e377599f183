"""Record how GPTQModel dequantizes tensors of our packer: writes data/gptqmodel_dequantized.safetensors.

Run by hand, in an environment of its own (GPTQModel needs far more than vlquant does):
    pip install gptqmodel==7.3.6 torch==2.13.0 transformers==5.23.0 optimum==2.3.0 requests safetensors
    PYTHONPATH=. GPTQMODEL_CPU_WORKERS=2 python tests/record_gptqmodel.py
"""

import sys
import types
from enum import Enum
from pathlib import Path

import datasets
import torch
import transformers
from safetensors.torch import save_file

from vlquant.packing import pack_gptq

OUT_FEATURES, IN_FEATURES, GROUP_SIZE = 64, 256, 64
RECORDED = Path(__file__).parent / "data" / "gptqmodel_dequantized.safetensors"


def import_gptqmodel() -> None:
    """GPTQModel imports torchvision without declaring it; nothing used here needs it."""
    assert transformers.LlamaForCausalLM and datasets  # these first: they must see that torchvision is really absent
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.InterpolationMode = Enum("InterpolationMode", "BICUBIC BILINEAR NEAREST")
        sys.modules[name] = module


def random_linear(bits: int) -> dict[str, torch.Tensor]:
    """Packed tensors with every code and with scales of both signs."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT_FEATURES, IN_FEATURES), dtype=torch.uint8, generator=generator)
    scales = (torch.randn(IN_FEATURES // GROUP_SIZE, OUT_FEATURES, generator=generator) * 0.01).to(torch.float16)
    return pack_gptq(codes, scales, bits=bits, group_size=GROUP_SIZE)


def dequantize(packed: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """What GPTQModel's plain torch linear multiplies by, float16 [out, in]."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    linear = TorchLinear(
        bits=bits, group_size=GROUP_SIZE, sym=True, desc_act=False, in_features=IN_FEATURES, out_features=OUT_FEATURES
    )
    for name, tensor in packed.items():
        getattr(linear, name).copy_(tensor)
    convert_gptq_v1_to_v2_format_module(linear, bits=bits, pack_dtype=torch.int32)
    linear.optimize = lambda *arguments, **options: None  # no compilation for one matrix
    linear.post_init()
    return linear.eval().dequantize_weight().T.to(torch.float16).contiguous()


def main() -> None:
    import_gptqmodel()
    recorded = {}
    for bits in (4, 8):
        packed = random_linear(bits)
        dequantized = dequantize({name: tensor.clone() for name, tensor in packed.items()}, bits)
        recorded |= {f"bits{bits}.{name}": tensor for name, tensor in packed.items()}
        recorded[f"bits{bits}.dequantized"] = dequantized
    save_file(recorded, RECORDED, metadata={"gptqmodel": __import__("gptqmodel").__version__})
    print(f"{RECORDED.name}: {RECORDED.stat().st_size} bytes")


if __name__ == "__main__":
    main()
