"""The two weight formats of bitsandbytes, written and read side by side, as transformers stores them.

NF4 with double quantization: blocks of 64 consecutive weights (row-major) share an absolute maximum, which is itself stored
in 8 bits in blocks of 256. LLM.int8: one absolute maximum per row. Writing asks the bitsandbytes library; reading is plain torch.
"""

import json
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from vlquant.errors import MissingDependency

BLOCK = 64
NESTED_BLOCK = 256
STATE = "weight.quant_state.bitsandbytes__nf4"


def quantize_nf4(weight: Tensor) -> dict[str, Tensor]:
    """Quantize a weight [out, in] to NF4 with double quantization.

    Returns weight uint8 [out * in / 2, 1], weight.absmax uint8 [blocks], weight.quant_map float32 [16],
    weight.nested_absmax float32, weight.nested_quant_map float32 [256] and the state as JSON bytes.
    Raises MissingDependency without bitsandbytes.
    """
    functional = _library()
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": packed, **tensors}


def dequantize_nf4(tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] that NF4 tensors stand for."""
    state = nf4_state(tensors)
    values, byte = tensors["weight.quant_map"], torch.arange(256, device=tensors["weight"].device)
    pairs = torch.stack((values[byte >> 4], values[byte & 15]), dim=1)  # the high half of a byte comes first
    # In place from here on: of a wide linear every copy is a quarter of a gigabyte.
    weight = pairs[tensors["weight"].reshape(-1).to(torch.int32)].reshape(-1)
    largest, size = nf4_block_maxima(tensors), state["blocksize"]
    whole = weight.numel() // size
    weight[: whole * size].view(whole, size).mul_(largest[:whole, None])
    weight[whole * size :].mul_(largest[whole:])  # a last incomplete block
    out_features, in_features = state["shape"]
    return weight[: out_features * in_features].to(dtype).reshape(out_features, in_features)


def nf4_state(tensors: Mapping[str, Tensor]) -> dict:
    """The JSON state of NF4 tensors: shape, blocksize, nested_blocksize, nested_offset, dtype."""
    return json.loads(bytes(tensors[STATE].tolist()))


def nf4_block_maxima(tensors: Mapping[str, Tensor]) -> Tensor:
    """The absolute maximum of every block of consecutive weights: float32 [blocks]."""
    state = nf4_state(tensors)
    codes = tensors["weight.absmax"].long()
    nested = torch.arange(codes.numel(), device=codes.device) // state["nested_blocksize"]
    return tensors["weight.nested_quant_map"][codes] * tensors["weight.nested_absmax"][nested] + state["nested_offset"]


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """Quantize a weight [out, in] to LLM.int8's row-wise form.

    Returns weight int8 [out, in], SCB float32 [out] (largest absolute value of each row) and weight_format (0: row-major).
    Raises MissingDependency without bitsandbytes.
    """
    # The library itself goes through float16 here, whatever the model's dtype.
    codes, row_maxima, _ = _library().int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    return {"weight": codes, "SCB": row_maxima, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def dequantize_int8(tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] that row-wise int8 tensors stand for."""
    row_scale = tensors["SCB"][:, None] * (1 / 127)
    return (tensors["weight"].to(torch.float32) * row_scale).to(dtype)


def _library():
    # It warns of a missing kernel for multiplying, which is not what we use it for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise MissingDependency(
            "--method bnb needs the bitsandbytes library, which is not installed; pip install bitsandbytes"
        ) from error
    return functional
