"""Round one weight matrix so that its outputs change least (GPTQ). Pure tensor arithmetic: no model, files or formats.

Throughout: weight float32 [out, in]; hessian float32 [in, in], the weighted sum of x xT over the inputs x of the linear;
scales float16 [groups, out], signed, one per group of `group_size` consecutive inputs; codes uint8 [out, in] in 0 .. 2**bits - 1,
meaning scale * (code - 2**(bits - 1)).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKAGES = torch.linspace(1.05, 0.45, 25).tolist()
"""Factors on the full-range scale that the search tries, with either sign."""
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0
"""What float16 can hold."""
BLOCK = 128
"""Columns rounded before their errors reach the columns after them: changes speed, not results."""
SEARCH_ELEMENTS = 2**18
"""Weights searched at once, so that the candidates stay in a CPU's cache."""
MOST_DAMPING = 0.5


@dataclass(frozen=True)
class Rounding:
    """A rounded weight."""

    codes: Tensor
    scales: Tensor
    damping: float | None
    """Damping that made the Hessian invertible; None: none did, and the weight was rounded to the nearest."""


def quantize_weight(weight: Tensor, hessian: Tensor, *, bits: int, group_size: int, damping: float) -> Rounding:
    """Round `weight` with GPTQ: searched static scales, columns in order of falling activity.

    Falls back to rounding to the nearest code if no damping up to 0.5 makes the Hessian positive definite.
    """
    group_size = weight.shape[1] if group_size == -1 else group_size
    importance = torch.nan_to_num(hessian.diagonal(), nan=0.0, posinf=0.0)
    scales = search_scales(weight, importance, bits=bits, group_size=group_size)
    column_scales = expand_scales(scales, group_size)
    order = importance.argsort(descending=True, stable=True)
    factor, used = inverse_factor(hessian[order][:, order], damping)
    if factor is None:
        return Rounding(nearest_codes(weight, column_scales, bits), scales, None)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes[:, order] = solve(weight[:, order], column_scales[:, order], factor, bits=bits)
    return Rounding(codes, scales, used)


def round_weight(weight: Tensor, *, bits: int, group_size: int) -> Rounding:
    """Round `weight` to the nearest codes with searched scales, all inputs alike."""
    group_size = weight.shape[1] if group_size == -1 else group_size
    scales = search_scales(weight, torch.ones(weight.shape[1], device=weight.device), bits=bits, group_size=group_size)
    return Rounding(nearest_codes(weight, expand_scales(scales, group_size), bits), scales, None)


def search_scales(weight: Tensor, importance: Tensor, *, bits: int, group_size: int) -> Tensor:
    """The float16 scales [groups, out] that round `weight` to the nearest code with least error weighted by `importance` [in].

    The full-range scale sends the largest weight of a group, sign included, to the lowest code; the
    search tries shrunken ones of either sign. Rounded to float16 here, so that the solver sees what is stored.
    """
    out_features, in_features = weight.shape
    groups = in_features // group_size
    floor = importance.mean() * 1e-6 + torch.finfo(torch.float32).tiny  # a column never active still has to be rounded
    importance = importance.clamp(min=floor).reshape(groups, group_size)
    rows = max(1, SEARCH_ELEMENTS // in_features)
    found = [
        _search_rows(part.reshape(-1, groups, group_size), importance, 2 ** (bits - 1)) for part in weight.split(rows)
    ]
    return torch.cat(found).T.contiguous()


def _search_rows(weight: Tensor, importance: Tensor, zero: int) -> Tensor:
    """Best scales float16 [rows, groups] of `weight` [rows, groups, group_size]."""
    largest = weight.gather(2, weight.abs().argmax(dim=2, keepdim=True))  # [rows, groups, 1], signed
    full_range = largest / -zero
    best_scale = representable(full_range)
    best_error = torch.full_like(full_range, torch.inf)
    for shrinkage in SHRINKAGES:
        for sign in (1.0, -1.0):
            scale = representable(full_range * (sign * shrinkage))
            rounded = (weight / scale).round_().clamp_(-zero, zero - 1).mul_(scale)
            error = rounded.sub_(weight).square_().mul_(importance).sum(dim=2, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
    return best_scale.squeeze(2).to(torch.float16)


def representable(scale: Tensor) -> Tensor:
    """The nearest float16 value to each scale, as float32: finite and never zero."""
    magnitude = scale.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.where(scale < 0, -magnitude, magnitude).to(torch.float16).to(torch.float32)


def expand_scales(scales: Tensor, group_size: int) -> Tensor:
    """One float32 scale per weight [out, in] from one per group [groups, out]."""
    return scales.T.to(torch.float32).repeat_interleave(group_size, dim=1)


def nearest_codes(weight: Tensor, column_scales: Tensor, bits: int) -> Tensor:
    """The code nearest to each weight."""
    zero = 2 ** (bits - 1)
    return ((weight / column_scales).round().clamp(-zero, zero - 1) + zero).to(torch.uint8)


def dequantize(codes: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """The float32 weight [out, in] that codes and group scales stand for."""
    group_size = codes.shape[1] // scales.shape[0]
    return (codes.to(torch.float32) - 2 ** (bits - 1)) * expand_scales(scales, group_size)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float | None]:
    """The upper U with U.T @ U = inverse(hessian + damping), and the damping used; (None, None) if there is none.

    A column that was never active is left to itself. The damping doubles until the Hessian is positive definite.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()) or not bool((diagonal > 0).any()):
        return None, None
    silent = (diagonal == 0).to(hessian.dtype)
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    while damping <= MOST_DAMPING:
        damped = hessian + torch.diag(silent + damping * diagonal.mean())
        # The Cholesky factor of the flipped matrix, flipped back, is upper with damped = R @ R.T: its inverse is U.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        if not int(failed) and bool(torch.isfinite(factor).all()):
            return factor, damping
        damping *= 2
    return None, None


def solve(weight: Tensor, column_scales: Tensor, factor: Tensor, *, bits: int) -> Tensor:
    """Round the columns of `weight` from left to right, each time moving the error into the columns still float.

    column_scales: float32 [out, in]; factor: from `inverse_factor`, columns in the same order. Returns codes.
    """
    zero = 2 ** (bits - 1)
    weight, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for block_start in range(0, weight.shape[1], BLOCK):
        block = slice(block_start, min(block_start + BLOCK, weight.shape[1]))
        errors = torch.zeros_like(weight[:, block])
        for column in range(block.start, block.stop):
            scale = column_scales[:, column]
            code = (weight[:, column] / scale).round().clamp(-zero, zero - 1)
            codes[:, column] = (code + zero).to(torch.uint8)
            error = (weight[:, column] - code * scale) / factor[column, column]
            weight[:, column : block.stop] -= torch.outer(error, factor[column, column : block.stop])
            errors[:, column - block.start] = error
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes


def compensation(drift: Tensor, hessian: Tensor, damping: float) -> Tensor | None:
    """What to add to a weight so that inputs x do for it what the float model's inputs f do: drift @ inverse(hessian + damping).

    drift: the weighted sum of (W f - W x) xT [out, in]. None if that cannot be computed. (Ridge regression; the error
    propagation of arXiv 2504.09629, and the asymmetric calibration of arXiv 2504.02692 in closed form.)
    """
    damped = hessian + torch.diag((damping * hessian.diagonal().mean()).expand(len(hessian)))
    lower, failed = torch.linalg.cholesky_ex(damped)
    found = torch.cholesky_solve(drift.T, lower).T
    return found if not int(failed) and bool(torch.isfinite(found).all()) else None


def squared_errors(wanted: Tensor, rounded: Tensor, rows: Tensor) -> Tensor:
    """How far the outputs of `rounded` [out, in] for inputs [tokens, in] are from those wanted [tokens, out], squared, by token."""
    return (wanted - rows @ rounded.T).square().sum(1)
