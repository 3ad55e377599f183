"""Packed linears of every form that readers of GPTQ meet, with the weights they stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlquant.members import MEMBERS, Member
from vlquant.packing import _pack_rows, pack_gptq, unpack_gptq


@dataclass(frozen=True)
class GptqForm:
    """What tensors of a linear may look like."""

    bits: int
    group_size: int
    shape: tuple[int, int] = (32, 384)
    shuffled: bool = False
    """Columns of a group lie anywhere (desc_act)."""
    zeros: str = "middle"
    version: int = 1

    def __str__(self) -> str:
        return f"{self.bits}bit-g{self.group_size}-{self.shape[0]}x{self.shape[1]}-{'shuffled-' * self.shuffled}{self.zeros}-v{self.version}"

    def tensors(self) -> dict[str, Tensor]:
        """As in a file."""
        generator = torch.Generator().manual_seed(self.bits + self.shape[1])
        out_features, in_features = self.shape
        groups = 1 if self.group_size == -1 else in_features // self.group_size
        codes = torch.randint(0, 2**self.bits, self.shape, dtype=torch.uint8, generator=generator)
        scales = torch.randn(groups, out_features, generator=generator).mul(0.01).half()
        tensors = pack_gptq(codes, scales, bits=self.bits, group_size=self.group_size)
        if self.shuffled:
            tensors["g_idx"] = tensors["g_idx"][torch.randperm(in_features, generator=generator)]
        if self.zeros == "anywhere":
            stored = torch.randint(0, 2**self.bits, (groups, out_features), dtype=torch.uint8, generator=generator)
            tensors["qzeros"] = _pack_rows(stored.T, self.bits).T.contiguous()
        elif self.version == 2:
            middle = torch.full((groups, out_features), 2 ** (self.bits - 1), dtype=torch.uint8)
            tensors["qzeros"] = _pack_rows(middle.T, self.bits).T.contiguous()
        return tensors

    def weight(self) -> Tensor:
        """float64 [out, in]: scale * (code - zero), by the format's own reader."""
        tensors = self.tensors()
        codes, scales, zeros = unpack_gptq(tensors, self.bits, self.version)
        group = tensors["g_idx"].long()
        return scales.double()[group].T * (codes.double() - zeros.double()[group].T)


FORMS = (
    *(GptqForm(bits, group_size) for bits in (3, 4, 8) for group_size in (32, 64, 128, -1)),
    *(GptqForm(bits, 32, shuffled=True) for bits in (4, 8)),
    *(GptqForm(bits, 64, zeros="anywhere", version=version) for bits in (3, 4, 8) for version in (1, 2)),
    *(GptqForm(bits, 32, zeros="anywhere", shuffled=True) for bits in (4, 8)),
    *(GptqForm(bits, -1, zeros="anywhere", version=2) for bits in (4, 8)),
    *(GptqForm(bits, 32, shape) for bits in (4, 8) for shape in ((32, 32), (64, 1056), (96, 96))),
)


def linear_shapes(member: Member) -> set[tuple[int, int]]:
    """[out, in] of the seven linears of a member's layers."""
    head_dim = member.more.get("head_dim", member.hidden_size // member.heads)
    queries, keys = member.heads * head_dim, member.key_value_heads * head_dim
    hidden, wide = member.hidden_size, member.intermediate_size
    return {(queries, hidden), (keys, hidden), (hidden, queries), (wide, hidden), (hidden, wide)}


FAMILY_SHAPES = sorted(set().union(*map(linear_shapes, MEMBERS.values())))
FAMILY_INPUTS = sorted({columns for _, columns in FAMILY_SHAPES})
"""What a row's arithmetic depends on."""


def random_tensors(shape: tuple[int, int], bits: int, group_size: int = 128) -> dict[str, Tensor]:
    """GPTQ tensors of a large linear, made without packing: any word is some codes."""
    out_features, in_features = shape
    groups, generator = in_features // group_size, torch.Generator().manual_seed(sum(shape))
    middle = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]
    return {
        "qweight": torch.randint(-(2**31), 2**31, (in_features * bits // 32, out_features), dtype=torch.int32, generator=generator),
        "qzeros": torch.full((groups, out_features * bits // 32), middle, dtype=torch.int32),
        "scales": torch.randn(groups, out_features, generator=generator).mul(0.01).half(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // group_size,
    }
