"""Where a bundle's divergence comes from: its exported vision tower, its language model, or both together.

Measured along the same answers with only one of the two as it is in the bundle. Everything lies in files already; one
decoder layer is in memory.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlquant.check_result import Blame
from vlquant.forced import Answers, LogitsHead, compare_answers, forced_states
from vlquant.hidden_states import HiddenStates
from vlquant.model import Model

QUESTIONS = 48
"""Asked for the blame, evenly spread over those with pictures."""
StatesOf = Callable[[int], Tensor]
"""Hidden states [answer tokens, hidden_size] after the last layer, by number of question."""


def find_blame(
    models: tuple[Model, Model], heads: tuple[LogitsHead, LogitsHead], prompts: tuple[HiddenStates, HiddenStates],
    states: tuple[StatesOf, StatesOf], answers: Answers, *, step: Callable[[int, int], None],
) -> Blame | None:  # fmt: skip
    """Mean divergence with only the vision tower, only the language model, and both as in the bundle; None without answers or finite numbers.

    models, heads, prompts: reference and bundle; states: theirs along an answer, as `forced_states` has them; answers: of questions
    with pictures, of which some are taken.
    """
    chosen = spread(answers)
    if not chosen:
        return None
    own = tuple([each(number) for number in chosen] for each in states)
    both = mean_divergence(heads, own, chosen)
    if all(torch.equal(prompts[0][number], prompts[1][number]) for number in chosen):
        return Blame(len(chosen), None, both, both) if math.isfinite(both) else None
    layers, done, device = models[0].config.decoder.layers, 0, str(heads[0].norm.device)

    def count(*_: int) -> None:
        nonlocal done
        done += 1
        step(done, 2 * layers)

    apart = []
    for model in (0, 1):  # Each with the other's features.
        with tempfile.TemporaryDirectory(prefix="vlquant-blame-") as folder:
            mixed = forced_states(models[model], prompts[1 - model], chosen, folder=Path(folder), device=device, step=count)
            apart.append(mean_divergence((heads[0], heads[model]), (own[0], mixed), chosen))
    if not all(map(math.isfinite, (*apart, both))):
        return None
    return Blame(len(chosen), *apart, both)


def spread(answers: Answers) -> dict[int, Sequence[int]]:
    """At most QUESTIONS of the answers, evenly spread."""
    numbers = list(answers)
    return {index: answers[index] for index in numbers[:: max(1, -(-len(numbers) // QUESTIONS))]}


def mean_divergence(heads: tuple[LogitsHead, LogitsHead], states: tuple[Iterable[Tensor], Iterable[Tensor]], answers: Answers) -> float:
    """Mean over all answer tokens, in nats; infinite if the numbers of one model overflowed at all of them."""
    apart = torch.cat([each.divergence[each.finite] for each in compare_answers(heads, states, answers)])
    return float(apart.mean()) if len(apart) else math.inf
