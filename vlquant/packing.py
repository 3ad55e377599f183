"""The GPTQ v1 weight format, written and read side by side. Knows tensors of one linear, nothing of models or files.

A weight [out, in] is stored as unsigned codes of `bits` bits with one signed float16 scale per group of input columns:
weight = scale * (code - zero), zero = 2**(bits - 1) everywhere.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

WORD = 32
"""Codes are packed into words of 32 bits."""
WORD_MASK = 2**WORD - 1


def symmetric_zero(bits: int) -> int:
    """The code that stands for 0."""
    return 2 ** (bits - 1)


def pack_gptq(codes: Tensor, scales: Tensor, *, bits: int, group_size: int) -> dict[str, Tensor]:
    """Pack the codes and scales of one linear into the tensors every GPTQ reader knows.

    codes: uint8 [out, in] in 0 .. 2**bits - 1; scales: float16 [groups, out], may be negative; group_size -1: one group.
    Returns qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales and g_idx int32 [in].
    """
    out_features, in_features = codes.shape
    columns = in_features if group_size == -1 else group_size
    # Version 1 of the format stores the zero minus one; its readers add one.
    zeros = torch.full((scales.shape[0], out_features), symmetric_zero(bits) - 1, dtype=torch.uint8)
    return {
        "qweight": _pack_rows(codes.T, bits),
        "qzeros": _pack_rows(zeros.T, bits).T.contiguous(),
        "scales": scales.to(torch.float16).contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // columns,
    }


def unpack_gptq(tensors: Mapping[str, Tensor], bits: int, version: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_gptq`: codes uint8 [out, in], scales float16 [groups, out], zeros int16 [groups, out].

    version: 1, or 2 ("gptq_v2"), which stores zeros as they are.
    """
    codes = _unpack_rows(tensors["qweight"], bits).T.contiguous()  # [out, in]
    zeros = _unpack_rows(tensors["qzeros"].T.contiguous(), bits).T.to(torch.int16)
    # Version 1 stores 0 as the largest code, which one more brings back to 0.
    zeros = zeros + 1 & 2**bits - 1 if version == 1 else zeros
    return codes, tensors["scales"], zeros


def dequantize_gptq(tensors: Mapping[str, Tensor], *, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] that packed tensors stand for."""
    codes, scales, zeros = unpack_gptq(tensors, bits)
    group = tensors["g_idx"].long()  # [in]
    scale = scales.to(dtype)[group]  # [in, out]
    shifted = codes.T.to(dtype) - zeros.to(dtype)[group]
    return (scale * shifted).T.contiguous()


def select_outputs(kind: str, tensor: Tensor, rows: Tensor, out_features: int) -> Tensor:
    """One of the tensors ("qweight", ...) of a packed linear with `out_features`, for some of its rows only."""
    if kind == "g_idx":
        return tensor
    if kind != "qzeros":
        return tensor[:, rows].contiguous()
    bits = WORD * tensor.shape[1] // out_features
    zeros = _unpack_rows(tensor.T.contiguous(), bits)[rows]
    return _pack_rows(zeros, bits).T.contiguous()


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """[rows, columns] codes -> int32 [rows * bits / 32, columns]: each column a stream of bits, the first row lowest.

    3 bits do not divide a word: two of 32 codes lie across its ends, as AutoGPTQ has them.
    """
    grouped = codes.to(torch.int64).reshape(-1, WORD, codes.shape[1])  # [groups, 32, columns]
    words = grouped.new_zeros(grouped.shape[0], bits, codes.shape[1])
    for row in range(WORD):
        word, shift = divmod(row * bits, WORD)
        words[:, word] |= grouped[:, row] << shift & WORD_MASK
        if shift + bits > WORD:
            words[:, word + 1] |= grouped[:, row] >> (WORD - shift)
    # The top bit of the word is the sign of an int32.
    words = words.reshape(-1, codes.shape[1])
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpack_rows(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack_rows`: int32 [words, columns] -> uint8 [words * 32 / bits, columns]."""
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)[:, None]
        codes = (words[:, None, :] >> shifts) & (2**bits - 1)  # [words, per_word, columns]
        return codes.to(torch.uint8).reshape(-1, words.shape[1])
    grouped = (words.to(torch.int64) & WORD_MASK).reshape(-1, bits, words.shape[1])
    codes = []
    for row in range(WORD):
        word, shift = divmod(row * bits, WORD)
        code = grouped[:, word] >> shift
        if shift + bits > WORD:
            code = code | grouped[:, word + 1] << (WORD - shift)
        codes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=1).reshape(-1, words.shape[1])
