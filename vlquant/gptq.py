"""Round one weight matrix so that its outputs change least (GPTQ). Pure tensor arithmetic: no model, files or formats.

Throughout: weight float32 [out, in]; hessian float32 [in, in], the weighted sum of x xT over the inputs x of the linear;
scales float16 [groups, out], signed, one per group of `group_size` consecutive inputs; codes uint8 [out, in] in 0 .. 2**bits - 1,
meaning scale * (code - 2**(bits - 1)).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKAGES = torch.linspace(1.05, 0.45, 13).tolist()
"""Factors on the full-range scale that the search tries, with either sign; then those halfway to the best one's neighbours."""
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


@dataclass(frozen=True)
class Inverse:
    """An inverted Hessian, its columns in order of falling activity."""

    order: Tensor
    """int64 [in]."""
    factor: Tensor
    """The upper U with U.T @ U = inverse(hessian[order][:, order] + damping)."""
    damping: float


def invert(hessian: Tensor, damping: float) -> Inverse | None:
    """Invert a Hessian; None if no damping up to 0.5 makes it positive definite."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor, used = inverse_factor(hessian, order, damping)
    return None if factor is None else Inverse(order, factor, used)


def quantize_weight(
    weight: Tensor, importance: Tensor, inverse: Inverse | None, *, bits: int, group_size: int
) -> Rounding:
    """Round `weight` with GPTQ: searched static scales, columns in order of falling activity.

    importance: the Hessian's diagonal [in]. Without an inverse, rounds to the nearest code.
    """
    group_size = weight.shape[1] if group_size == -1 else group_size
    importance = torch.nan_to_num(importance, nan=0.0, posinf=0.0)
    scales = search_scales(weight, importance, bits=bits, group_size=group_size)
    column_scales = expand_scales(scales, group_size)
    if inverse is None:
        return Rounding(nearest_codes(weight, column_scales, bits), scales, None)
    codes, order = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), inverse.order
    codes[:, order] = solve(weight[:, order], column_scales[:, order], inverse.factor, bits=bits)
    return Rounding(codes, scales, inverse.damping)


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
    best_shrinkage, best_error = torch.ones_like(full_range), torch.full_like(full_range, torch.inf)

    def attempt(shrinkage: Tensor | float) -> None:
        nonlocal best_shrinkage, best_error
        scale = representable(full_range * shrinkage)
        rounded = (weight / scale).round_().clamp_(-zero, zero - 1).mul_(scale)
        error = rounded.sub_(weight).square_().mul_(importance).sum(dim=2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_shrinkage = torch.where(better, shrinkage, best_shrinkage)

    for shrinkage in SHRINKAGES:
        for sign in (1.0, -1.0):
            attempt(sign * shrinkage)
    coarse, half_step = best_shrinkage, (SHRINKAGES[0] - SHRINKAGES[1]) / 2
    for step in (half_step, -half_step):
        attempt(coarse + step)
    return representable(full_range * best_shrinkage).squeeze(2).to(torch.float16)


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


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor | None, float | None]:
    """The upper U with U.T @ U = inverse(hessian[order][:, order] + damping), and the damping used; (None, None) if there is none.

    A column that was never active is left to itself. The damping doubles until the Hessian is positive definite. Of a wide
    layer each copy is a gigabyte, so that none lives longer than it must.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()) or not bool((diagonal > 0).any()):
        return None, None
    silent, mean = (diagonal == 0).to(hessian.dtype), diagonal.mean()
    while damping <= MOST_DAMPING:
        # Of the matrix in reverse order the inverse of the lower Cholesky factor, in reverse order, is U.
        lower = lower_factor(hessian, order.flip(0), silent + damping * mean)
        if lower is not None:
            inverse = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            if bool(torch.isfinite(inverse).all()):
                return inverse.flip(0, 1), damping
        damping *= 2
    return None, None


def lower_factor(hessian: Tensor, order: Tensor, increments: Tensor) -> Tensor | None:
    """The lower Cholesky factor of hessian[order][:, order] with `increments` [in] on its diagonal; None if it has none."""
    damped = hessian[order][:, order]
    damped.diagonal().add_(increments[order])
    lower, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else lower


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


def compensation(drift: Tensor, inverse: Inverse) -> Tensor:
    """What to add to a weight so that inputs x do for it what the float model's inputs f do: drift @ inverse(hessian + damping).

    drift: the weighted sum of (W f - W x) xT [out, in]. (Ridge regression; the error propagation of arXiv 2504.09629, and
    the asymmetric calibration of arXiv 2504.02692 in closed form.)
    """
    change = torch.empty_like(drift)
    change[:, inverse.order] = drift[:, inverse.order] @ inverse.factor.T @ inverse.factor
    return change


def squared_errors(wanted: Tensor, rounded: Tensor, rows: Tensor) -> Tensor:
    """How far the outputs of `rounded` [out, in] for inputs [tokens, in] are from those wanted [tokens, out], squared, by token."""
    return (wanted - rows @ rounded.T).square().sum(1)
