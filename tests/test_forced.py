"""Layer by layer through files gives what the whole model in memory gives."""

import pytest
import torch

from vlquant.forced import LogitsHead, compare_answers, forced_states
from vlquant.hidden_states import HiddenStates, write_states
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.request import Request
from vlquant.runtime.pipeline import load

QUESTIONS = (Request("Was ist das?"), Request("Say more."))


def streamed(pipeline, prompts, answers, folder):
    """Logits of the answers, and their states, with one layer in memory."""
    batches = [pipeline.prepare([each]) for each in prompts]
    lengths = write_states(folder / "prompts.f32", (each.embeddings for each in batches))
    embedded = HiddenStates(folder / "prompts.f32", lengths, pipeline.config.decoder.hidden_size)
    steps, answers = [], dict(enumerate(answers))
    states = forced_states(
        pipeline.model, embedded, answers, folder=folder, device="cpu", step=lambda passed: steps.append((passed.index + 1, passed.layers))
    )
    layers = pipeline.config.decoder.layers
    assert steps == [(index + 1, layers) for index in range(layers)]
    assert {path.name for path in folder.glob("*.f32")} == {"prompts.f32", "answers.f32"}
    head = LogitsHead(pipeline.model)
    return [head(rows) for rows in states], states


@torch.inference_mode()
def test_logits_are_those_of_the_whole_model(case, tmp_path):
    pipeline = load(case.folder, vision="torch")
    answers = [[5, 9, 7, pipeline.stop_id], [pipeline.stop_id]]
    found, _ = streamed(pipeline, QUESTIONS, answers, tmp_path)
    for request, ids, logits in zip(QUESTIONS, answers, found, strict=True):
        (wanted,) = pipeline.answer_logits([request], [ids])
        assert logits.shape == wanted.shape
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_rope_that_stretches_is_followed_token_by_token(named_case, tmp_path):
    pipeline = load(named_case("internlm2_chat_ntk").folder, vision="torch")
    limit = pipeline.config.decoder.max_positions
    words = Request("a " * (limit - 2 - len(pipeline.encode(Request("")).ids)))
    reached = len(pipeline.encode(words).ids)
    answers = [[5] * (limit - reached + 4)]
    (found,), _ = streamed(pipeline, [words], answers, tmp_path)
    (wanted,) = pipeline.answer_logits([words], answers)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_bundle_beside_its_reference(named_case, tmp_path):
    source = named_case("internlm2_internvl2_5").folder
    bundle = quantize(source, recipe=Recipe(method="rtn", bits=4, group_size=32), output=tmp_path / "bundle")
    pipelines, answers = [load(folder, vision="torch") for folder in (source, bundle)], [[5] * 70, [7]]
    states = []
    for name, pipeline in zip(("first", "second"), pipelines, strict=True):
        (tmp_path / name).mkdir()
        states.append(streamed(pipeline, QUESTIONS, answers, tmp_path / name)[1])
    heads = tuple(LogitsHead(each.model) for each in pipelines)
    apart = list(compare_answers(heads, tuple(states), dict(enumerate(answers))))
    assert [len(each.divergence) for each in apart] == [70, 1]
    assert all(bool((each.divergence > 0).all()) for each in apart)
    itself = list(compare_answers((heads[0], heads[0]), (states[0], states[0]), dict(enumerate(answers))))
    assert max(float(each.divergence.max()) for each in itself) < 1e-9
    wanted, given = (each.answer_logits([QUESTIONS[1]], [[7]])[0].double().log_softmax(-1) for each in pipelines)
    assert apart[1].divergence.item() == pytest.approx(float((wanted.exp() * (wanted - given)).sum()), rel=1e-3)


@torch.inference_mode()
def test_some_of_the_prompts(named_case, tmp_path):
    pipeline = load(named_case("internlm2_internvl2_5").folder, vision="torch")
    lengths = write_states(tmp_path / "prompts.f32", (pipeline.prepare([each]).embeddings for each in QUESTIONS))
    prompts = HiddenStates(tmp_path / "prompts.f32", lengths, pipeline.config.decoder.hidden_size)
    found = forced_states(pipeline.model, prompts, {1: [7, 8]}, folder=tmp_path, device="cpu", step=lambda *done: None)
    (wanted,) = pipeline.answer_logits(QUESTIONS[1:], [[7, 8]])
    assert found.lengths == (2,)
    torch.testing.assert_close(LogitsHead(pipeline.model)(found[0]), wanted, atol=1e-4, rtol=1e-4)
