"""GPTQ arithmetic: better than rounding, equal to the textbook loop, and sane on hard inputs."""

import pytest
import torch

from vlquant import gptq


@pytest.fixture
def layer():
    """A seeded weight [96, 256] with correlated inputs: (weight, hessian of inputs, held-out inputs)."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(256, 256, generator=generator) * (0.7 ** torch.arange(256.0)).sqrt().clamp(min=0.05)
    inputs = torch.randn(4096, 256, generator=generator) @ mixing.T
    weight = torch.randn(96, 256, generator=generator) * 0.02
    return weight, inputs[:3072].T @ inputs[:3072] / 3072, inputs[3072:]


def quantized(weight, hessian, *, bits, group_size, damping=0.05):
    """GPTQ as a layer's linears get it."""
    inverse = gptq.invert(hessian, damping)
    return gptq.quantize_weight(weight, hessian.diagonal(), inverse, bits=bits, group_size=group_size)


def nearest_with_plain_scales(weight, bits, group_size):
    """Rounding as auto-gptq does it: the scale of a group is its largest absolute value over the highest code."""
    grouped = weight.reshape(weight.shape[0], -1, group_size)
    scale = (grouped.abs().amax(2) * 2 / (2**bits - 1)).repeat_interleave(group_size, 1)
    return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (4, -1), (8, 64)])
def test_error_is_well_below_rounding(layer, bits, group_size):
    weight, hessian, inputs = layer
    found = quantized(weight, hessian, bits=bits, group_size=group_size, damping=0.05)
    rounded = gptq.dequantize(found.codes, found.scales, bits=bits)
    plain = nearest_with_plain_scales(weight, bits, 256 if group_size == -1 else group_size)
    error, plain_error = ((inputs @ (weight - other).T).square().sum().sqrt() for other in (rounded, plain))
    assert error < 0.6 * plain_error
    group_size = 256 if group_size == -1 else group_size
    nearest = gptq.nearest_codes(weight, gptq.expand_scales(found.scales, group_size), bits)
    nearest = gptq.dequantize(nearest, found.scales, bits=bits)
    ours, plain = (gptq.squared_errors(inputs @ weight.T, each, inputs).sum().sqrt() for each in (rounded, nearest))
    assert ours < 0.8 * plain
    assert found.damping == 0.05


def test_blocked_solver_equals_column_by_column(layer):
    weight, hessian, _ = layer
    scales = gptq.search_scales(weight, hessian.diagonal(), bits=4, group_size=64)
    wide_weight, wide_hessian = weight.double(), hessian.double()
    column_scales = gptq.expand_scales(scales, 64).double()
    factor, _ = gptq.inverse_factor(wide_hessian, torch.arange(256), 0.05)
    inverse = factor.T @ factor
    rest, expected = wide_weight.clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for column in range(weight.shape[1]):
        code = (rest[:, column] / column_scales[:, column]).round().clamp(-8, 7)
        expected[:, column] = (code + 8).to(torch.uint8)
        error = (rest[:, column] - code * column_scales[:, column]) / inverse[0, 0]
        rest[:, column:] -= torch.outer(error, inverse[0])
        # Leave out the column just rounded: one step of Gaussian elimination on the inverse Hessian.
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    assert torch.equal(gptq.solve(wide_weight, column_scales, factor, bits=4), expected)


def test_inverse_factor_is_the_upper_factor_of_the_inverse(layer):
    hessian = layer[1].double()
    factor, damping = gptq.inverse_factor(hessian, torch.arange(len(hessian)), 0.05)
    damped = hessian + torch.eye(256, dtype=torch.float64) * damping * hessian.diagonal().mean()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-9, atol=1e-9)


def test_search_is_never_worse_than_the_full_range_scale(layer):
    weight, hessian, _ = layer
    importance = hessian.diagonal()
    searched = gptq.search_scales(weight, importance, bits=4, group_size=32)
    grouped = weight.reshape(96, 8, 32)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)
    full_range = gptq.representable(largest / -8).to(torch.float16).T
    errors = []
    for scales in (searched, full_range):
        codes = gptq.nearest_codes(weight, gptq.expand_scales(scales, 32), 4)
        errors.append(((gptq.dequantize(codes, scales, bits=4) - weight).square() * importance).sum())
    assert errors[0] < 0.9 * errors[1]
    assert searched.dtype == torch.float16 and (searched < 0).any() and (searched > 0).any()


def test_silent_column_keeps_its_rounded_value(layer):
    weight, hessian, _ = layer
    hessian = hessian.clone()
    hessian[7], hessian[:, 7] = 0, 0
    found = quantized(weight, hessian, bits=4, group_size=64, damping=0.05)
    nearest = gptq.nearest_codes(weight, gptq.expand_scales(found.scales, 64), 4)
    assert torch.equal(found.codes[:, 7], nearest[:, 7])
    assert found.codes[:, 7].unique().numel() > 4


def test_zero_and_tiny_groups_keep_finite_scales():
    weight = torch.zeros(32, 64)
    weight[0, 40] = 1e-12
    weight[1, :32] = 1e5
    found = quantized(weight, torch.eye(64), bits=4, group_size=32, damping=0.05)
    assert torch.isfinite(found.scales).all() and (found.scales != 0).all()
    rounded = gptq.dequantize(found.codes, found.scales, bits=4)
    assert torch.isfinite(rounded).all()
    torch.testing.assert_close(rounded, weight, rtol=1e-3, atol=1e-7)


def test_damping_doubles_until_positive_definite():
    hessian = torch.tensor([[1.0, 1.15], [1.15, 1.0]])  # eigenvalues 2.15 and -0.15: not a Gram matrix
    factor, damping = gptq.inverse_factor(hessian, torch.arange(len(hessian)), 0.05)
    assert factor is not None and damping == 0.2


@pytest.mark.parametrize("entry", [float("nan"), 5.0])
def test_hopeless_hessian_falls_back_to_the_nearest_code(layer, entry):
    weight, hessian, _ = layer
    hessian = hessian.clone()
    hessian[3, 4] = hessian[4, 3] = entry if entry != 5.0 else 5 * hessian.diagonal().max()
    found = quantized(weight, hessian, bits=4, group_size=64, damping=0.05)
    assert found.damping is None
    assert torch.equal(found.codes, gptq.nearest_codes(weight, gptq.expand_scales(found.scales, 64), 4))


def test_what_unseen_inputs_suffer_less_from_is_taken():
    """A GPTQ that has seen hardly anything is no better than rounding; one that has seen the like of the judge is."""
    from vlquant.activations import JudgingInputs
    from vlquant.quantized_layers import better_rounding

    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    mixing = torch.randn(128, 128) * torch.logspace(0, -2, 128)
    seen, unseen, few = (torch.randn(count, 128) @ mixing for count in (4096, 4096, 3))
    judging = JudgingInputs(unseen, unseen, torch.ones(4096), torch.arange(4096) % 3)
    for inputs, method in ((seen, "gptq"), (few, "rounding")):
        rounding = quantized(weight, inputs.T @ inputs, bits=4, group_size=32, damping=0.01)
        chosen, record = better_rounding("x", weight, weight, rounding, judging=judging, bits=4)
        assert record.method == method
        assert torch.equal(chosen.codes, rounding.codes) == (method == "gptq") and record.error <= record.nearest_error
        assert set(record.class_errors) == {"vision", "prompt", "answer"}
        rounded = gptq.dequantize(chosen.codes, chosen.scales, bits=4)
        lost, whole = (unseen[0::3] @ (weight - rounded).T).norm(), (unseen[0::3] @ weight.T).norm()
        assert record.class_errors["vision"] == pytest.approx(float(lost / whole), rel=1e-3)


def test_one_conversation_of_sixteen_is_held_out(tmp_path):
    from vlquant.calibrate import CalibrationInputs

    classes = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    inputs = {count: CalibrationInputs(tmp_path, (classes,) * count, 4) for count in (3, 15, 33, 160)}
    assert [len(inputs[count].held_out) for count in inputs] == [0, 1, 2, 10]
    assert [index // 16 for index in sorted(inputs[160].held_out)] == list(range(10))
    # Sets take turns: of two, neither must be the one that judges.
    assert {index % 2 for index in inputs[160].held_out} == {0, 1}
    assert {index for index in range(33) if len(inputs[33].judging.positions[index])} == inputs[33].held_out
    assert all(torch.equal(each, torch.arange(7)) for each in inputs[3].judging.positions)


def test_judging_tokens_stand_for_all_of_their_class():
    from vlquant.calibrate import JUDGES_OF_CLASS, choose_judges

    classes = [torch.tensor([0] * 700 + [1] * 5 + [2] * 3)] * 10
    judges = choose_judges(classes, [index % 2 == 0 for index in range(10)])
    chosen = judges.positions
    assert [len(each) > 0 for each in chosen] == [True, False] * 5
    counts = torch.stack([classes[0][each].bincount(minlength=3) for each in chosen[::2]])
    assert 0.5 * JUDGES_OF_CLASS < counts[:, 0].sum() <= JUDGES_OF_CLASS and counts[:, 0].max() - counts[:, 0].min() <= 1
    assert (counts[:, 1:] == torch.tensor([5, 3])).all()
    torch.testing.assert_close(judges.stands_for * counts.sum(0), torch.tensor([3500.0, 25.0, 15.0]))


@pytest.fixture
def two_classes():
    """A weight [96, 256]; ten times as many vision inputs as text inputs, which excite other columns: for GPTQ and unseen."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(96, 256, generator=generator) * 0.02
    mixing = [torch.randn(256, 256, generator=generator) * (0.9 ** torch.arange(256.0))[torch.randperm(256, generator=generator)] for _ in range(2)]
    draw = lambda count, each: torch.randn(count, 256, generator=generator) @ mixing[each]  # noqa: E731
    return weight, (draw(8000, 0), draw(800, 1)), (draw(2000, 0), draw(2000, 1))


def class_errors(weight, seen, unseen, shares):
    """Errors for unseen vision and text inputs after GPTQ with these weights of a vision and a text token."""
    hessian = sum(share * rows.T @ rows for share, rows in zip(shares, seen, strict=True))
    found = quantized(weight, hessian, bits=4, group_size=64, damping=0.05)
    rounded = gptq.dequantize(found.codes, found.scales, bits=4)
    return [float((gptq.squared_errors(rows @ weight.T, rounded, rows).sum() / (rows @ weight.T).square().sum()).sqrt()) for rows in unseen]


def test_balance_helps_text_and_hardly_hurts_vision(two_classes):
    weight, seen, unseen = two_classes
    vision, text = class_errors(weight, seen, unseen, (1 / 8800, 1 / 8800))
    balanced_vision, balanced_text = class_errors(weight, seen, unseen, (0.45 / 8000, 0.55 / 800))
    assert balanced_text < 0.9 * text
    assert balanced_vision < 1.5 * vision


@pytest.mark.parametrize("bits", [3, 4])
def test_signed_search_beats_the_largest_value(layer, bits):
    weight, hessian, inputs = layer
    searched = gptq.search_scales(weight, hessian.diagonal(), bits=bits, group_size=64)
    codes = gptq.nearest_codes(weight, gptq.expand_scales(searched, 64), bits)
    rounded = gptq.dequantize(codes, searched, bits=bits), nearest_with_plain_scales(weight, bits, 64)
    error, plain_error = (gptq.squared_errors(inputs @ weight.T, each, inputs).sum().sqrt() for each in rounded)
    assert error < 0.9 * plain_error


def test_compensation_undoes_what_happened_to_the_inputs():
    """Where inputs were changed linearly, a changed weight gives the old outputs again."""
    generator = torch.Generator().manual_seed(2)
    weight, floats = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 32), (500, 32)))
    rows = floats @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)).double()
    drift = ((floats - rows) @ weight.T).T @ rows
    changed = weight + gptq.compensation(drift, gptq.invert(rows.T @ rows, 1e-9))
    torch.testing.assert_close(rows @ changed.T, floats @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("most", "lost"), [(1.0, "linearly"), (0.25, "linearly"), (1.0, "by chance")])
def test_a_weight_is_compensated_as_far_as_unseen_inputs_gain(most, lost):
    from vlquant.activations import JudgingInputs, SeenInputs
    from vlquant.quantized_layers import compensated

    generator = torch.Generator().manual_seed(4)
    weight, floats = torch.randn(16, 64, generator=generator), torch.randn(160, 64, generator=generator)
    change = 0.2 * torch.randn(64, 64, generator=generator) / 8
    rows = floats + (floats @ change if lost == "linearly" else 0.5 * torch.randn(160, 64, generator=generator))
    seen, unseen = slice(80), slice(80, None)
    drift = ((floats - rows)[seen] @ weight.T).T @ rows[seen]
    judging = JudgingInputs(rows[unseen], floats[unseen], torch.ones(80), torch.zeros(80, dtype=torch.long))
    hessian = rows[seen].T @ rows[seen]
    target, share = compensated(weight, SeenInputs(hessian, drift, judging), gptq.invert(hessian, 0.05), most=most)
    errors = [float((floats[unseen] @ weight.T - rows[unseen] @ each.T).norm()) for each in (weight, target)]
    assert 0 <= share <= most and errors[1] < errors[0]
    if lost == "linearly":
        assert share == most if most < 1 else share > 0.7
    else:
        assert share < 0.6  # What cannot be learnt from so few is left alone.
