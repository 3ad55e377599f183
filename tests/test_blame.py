"""Where divergence comes from, on a small checkpoint with one part at a time changed."""

import pytest
import torch

from vlquant.blame import find_blame, spread
from vlquant.forced import LogitsHead, forced_states
from vlquant.hidden_states import HiddenStates, write_states
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.recipe import Recipe

ANSWERS = {0: [5, 6, 7], 2: [8]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tests.golden_folder import golden_folder

    source = golden_folder() / "internlm2_internvl2_5"
    bundle = quantize(source, recipe=Recipe(method="rtn", group_size=32), output=tmp_path_factory.mktemp("blame") / "bundle")
    return open_model(source), open_model(bundle)


def stored(path, rows) -> HiddenStates:
    return HiddenStates(path, write_states(path, rows), rows[0].shape[1])


@pytest.fixture
def prompts(models, tmp_path):
    """The same embedded prompts, and with a little noise in the second one's tokens 2 to 5."""
    generator = torch.Generator().manual_seed(0)
    width = models[0].config.decoder.hidden_size
    rows = [torch.randn(length, width, generator=generator) for length in (8, 9, 10)]
    other = [each.clone() for each in rows]
    other[2][2:6] += 0.1 * torch.randn(4, width, generator=generator)
    return stored(tmp_path / "a.f32", rows), stored(tmp_path / "b.f32", other)


def blame(models, prompts, folder, answers=ANSWERS):
    steps, known = [], []
    for model, own in zip(models, prompts, strict=True):
        place = folder / str(len(known))
        place.mkdir()
        found = forced_states(model, own, answers, folder=place, device="cpu", step=lambda *done: None) if answers else ()
        known.append(dict(zip(answers, found, strict=True)).__getitem__)
    heads = tuple(map(LogitsHead, models))
    found = find_blame(models, heads, prompts, tuple(known), answers, step=lambda *done: steps.append(done))
    assert not steps or steps[-1][0] == steps[-1][1] == len(steps)
    return found


def test_each_part_alone_and_both(models, prompts, tmp_path):
    found = blame(models, prompts, tmp_path)
    assert found.questions == 2
    assert 0 < found.vision < found.both and 0 < found.language_model < 2 * found.both


def test_the_same_vision_is_not_to_blame(models, prompts, tmp_path):
    found = blame(models, (prompts[0], prompts[0]), tmp_path)
    assert found.vision is None and found.language_model == pytest.approx(found.both, rel=1e-6)


def test_the_same_language_model_is_not_to_blame(models, prompts, tmp_path):
    found = blame((models[0], models[0]), prompts, tmp_path)
    assert found.language_model < 1e-9 and found.vision == pytest.approx(found.both, rel=1e-6)


def test_nothing_to_ask(models, prompts, tmp_path):
    assert blame(models, prompts, tmp_path, {}) is None


def test_questions_are_spread_over_all():
    chosen = spread({number: [1] for number in range(100)})
    assert len(chosen) <= 48 and max(chosen) > 95
