"""The kernels' arithmetic in NumPy on the kernels' packing gives what the format's own reader gives."""

import numpy as np
import pytest
import torch

from vlquant.runtime.cuda_layout import KernelWeight, lay_out_float, lay_out_gptq, lay_out_int8

from tests import kernel_twin
from tests.gptq_forms import FORMS, FAMILY_INPUTS, GptqForm


def inputs(in_features: int, tokens: int = 2) -> torch.Tensor:
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(in_features))


def ordered(x: torch.Tensor, weight: KernelWeight) -> np.ndarray:
    return (x if weight.order is None else x[:, weight.order]).contiguous().numpy()


def assert_near(found: np.ndarray, expected: torch.Tensor, relative: float) -> None:
    """Errors in units of the largest result: single results may be near zero."""
    assert np.abs(found - expected.numpy()).max() <= relative * expected.abs().max()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gemv(form: GptqForm):
    weight, x = lay_out_gptq(form.tensors(), gptq_version=form.version), inputs(form.shape[1])
    assert_near(kernel_twin.gemv(weight, ordered(x, weight)), x.double() @ form.weight().T, 1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_dequantize(form: GptqForm):
    weight, expected = lay_out_gptq(form.tensors(), gptq_version=form.version), form.weight()
    expected = expected if weight.order is None else expected[:, weight.order]
    assert_near(kernel_twin.dequantize(weight, np.float32), expected, 1e-6)
    assert_near(kernel_twin.dequantize(weight, np.float16), expected, 2**-11)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gemv_of_rounded_activations(form: GptqForm):
    weight, x = lay_out_gptq(form.tensors(), gptq_version=form.version), inputs(form.shape[1])
    codes, scales = kernel_twin.round_activations(ordered(x, weight))
    rounded = torch.from_numpy(codes).double() * torch.from_numpy(scales).double().repeat_interleave(32, dim=1)
    expected = form.weight() if weight.order is None else form.weight()[:, weight.order]
    assert_near(kernel_twin.gemv_int8(weight, ordered(x, weight)), rounded @ expected.T, 1e-6)
    assert np.abs(rounded.numpy() - ordered(x, weight)).max() <= scales.max() / 2 * 1.0001


@pytest.mark.parametrize("in_features", FAMILY_INPUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_every_member(bits, in_features):
    form = GptqForm(bits, 128, (32, in_features))
    weight, x = lay_out_gptq(form.tensors()), inputs(in_features, 1)
    assert_near(kernel_twin.gemv(weight, x.numpy()), x.double() @ form.weight().T, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats(dtype):
    stored, x = inputs(384, 6).to(dtype), inputs(384)
    assert_near(kernel_twin.gemv(lay_out_float(stored), x.numpy()), x.double() @ stored.double().T, 1e-6)


def test_signed_bytes():
    codes = torch.randint(-127, 128, (6, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    maxima, x = torch.rand(6), inputs(96)
    weight = lay_out_int8(codes, maxima)
    expected = x.double() @ (codes.double() * maxima.double()[:, None] / 127).T
    assert_near(kernel_twin.gemv(weight, x.numpy()) * weight.row_scale.numpy(), expected, 1e-6)


def test_a_permuted_layout_would_show():
    form = GptqForm(4, 32)
    weight, x = lay_out_gptq(form.tensors()), inputs(384)
    swapped = KernelWeight("4bit", weight.codes.view(torch.uint8).flip(1).contiguous().view(torch.int32), 384, weight.scales, group_shift=2)
    found, expected = kernel_twin.gemv(swapped, x.numpy()), x.double() @ form.weight().T
    assert np.abs(found - expected.numpy()).max() > 0.1 * expected.abs().max()
