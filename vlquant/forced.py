"""Teacher forcing with one decoder layer in memory: what a model of any size makes of given answers.

Hidden states lie in files, so that the float reference of a model needs no more memory than one of its layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlquant.decoder import DecoderLayer, LayerCache, rms_norm
from vlquant.rope import rope_depends_on_length, rotary_tables
from vlquant.distributions import TokenComparison, compare_logits
from vlquant.family import LANGUAGE_MODEL
from vlquant.hidden_states import HiddenStates, write_states
from vlquant.model import Model
from vlquant.runtime.linear import Workspace
from vlquant.runtime.loading import load_head, load_layer

ROWS_AT_ONCE = 64
"""Answer tokens whose logits are in memory together: each has one per word of the vocabulary, in double precision."""
Answers = Mapping[int, Sequence[int]]
"""Ids of an answer, stop token included, by the number of its prompt."""


@dataclass(frozen=True)
class LayerPassed:
    """A layer that all answers have passed; its files lie there until whoever hears of it returns."""

    index: int
    layers: int
    """How many there are."""
    before: HiddenStates
    """What went into it: a conversation [length, hidden_size] for each answer, in their order."""
    after: HiddenStates


Step = Callable[[LayerPassed], None]
"""Hears of each layer that is done."""


@torch.inference_mode()
def forced_states(
    model: Model, prompts: HiddenStates, answers: Answers, *, folder: Path, device: str, step: Step
) -> HiddenStates:
    """Hidden states [answer tokens, hidden_size] after the last layer, where each token of each answer is predicted.

    prompts: embedded prompts, visual tokens in place. Files are made in `folder`; `step` is told of each layer.
    """
    workspace, config, starts = Workspace(device), model.config.decoder, [prompts.lengths[index] for index in answers]
    states = stored(folder / "layer-00000.f32", embedded_answers(model, prompts, answers), prompts.width)
    for index in range(config.layers):
        layer = load_layer(model, index, workspace)
        following = (run_layer(layer, rows.to(device), start) for rows, start in zip(states, starts, strict=True))
        after = stored(folder / f"layer-{index + 1:05}.f32", following, prompts.width)
        del layer  # Whoever hears of it may load others.
        step(LayerPassed(index, config.layers, states, after))
        states.path.unlink()
        states = after
    ends = (rows[start - 1 :] for rows, start in zip(states, starts, strict=True))
    found = stored(folder / "answers.f32", ends, prompts.width)
    states.path.unlink()
    return found


def stored(path: Path, states: Iterator[Tensor], width: int) -> HiddenStates:
    """States written to a file."""
    return HiddenStates(path, write_states(path, states), width)


def embedded_answers(model: Model, prompts: HiddenStates, answers: Answers) -> Iterator[Tensor]:
    """Prompts [length, hidden_size] with their answers behind them; the last token is only predicted, never read."""
    for index, ids in answers.items():
        known = torch.tensor(ids[:-1], dtype=torch.long)
        yield torch.cat((prompts[index], model.embedding_rows(known).float())) if len(known) else prompts[index]


def run_layer(layer: DecoderLayer, hidden: Tensor, prompt: int) -> Tensor:
    """One layer over a conversation [length, hidden_size] whose first `prompt` tokens were read at once."""
    config, length = layer.config, len(hidden)
    places = torch.arange(length, device=hidden.device)[None]
    if not rope_depends_on_length(config, length):
        return layer(hidden[None], rotary_tables(places, config))[0]
    # Such a rope turns keys by how long the conversation was when they came: only token by token is it what generating sees.
    shape = (1, config.key_value_heads, length, config.head_dim)
    cache, parts = LayerCache(hidden.new_empty(shape), hidden.new_empty(shape)), [prompt] + [1] * (length - prompt)
    pieces = zip(hidden[None].split(parts, 1), places.split(parts, 1), strict=True)
    return torch.cat([layer(rows, rotary_tables(own, config), cache=cache)[0] for rows, own in pieces])


class LogitsHead:
    """Final norm and head of a model: hidden states to logits."""

    def __init__(self, model: Model, device: str = "cpu"):
        self.norm, self.eps = model.tensor(f"{LANGUAGE_MODEL}norm.weight").float().to(device), model.config.decoder.norm_eps
        self.head = load_head(model, Workspace(device))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits float32 [tokens, vocab] of hidden states [tokens, hidden_size]."""
        return self.head(rms_norm(hidden.to(self.norm.device), self.norm, self.eps))


@torch.inference_mode()
def compare_answers(
    heads: tuple[LogitsHead, LogitsHead], states: tuple[Iterable[Tensor], Iterable[Tensor]], answers: Answers
) -> Iterator[TokenComparison]:
    """Reference and bundle, in this order, along each answer."""
    for wanted, given, ids in zip(*states, answers.values(), strict=True):
        parts = zip(wanted.split(ROWS_AT_ONCE), given.split(ROWS_AT_ONCE), torch.tensor(ids).split(ROWS_AT_ONCE), strict=True)
        compared = [compare_logits(heads[0](first), heads[1](second), own.tolist()) for first, second, own in parts]
        fields = TokenComparison.__dataclass_fields__
        yield TokenComparison(**{name: torch.cat([getattr(each, name) for each in compared]).cpu() for name in fields})
