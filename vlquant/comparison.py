"""Reference and bundle token by token along the same answers, one layer of either in memory; and where they part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vlquant.blame import find_blame, worst_tile
from vlquant.check_options import CheckOptions
from vlquant.check_result import Blame
from vlquant.distributions import TokenComparison
from vlquant.errors import BrokenCheckpoint
from vlquant.events import Event, Report
from vlquant.examination import Findings, Side
from vlquant.forced import Answers, LogitsHead, Step, compare_answers, forced_states
from vlquant.hidden_states import HiddenStates
from vlquant.model import Model, open_model
from vlquant.request import encode_answer
from vlquant.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Measured:
    """How far distributions are apart, and where that comes from."""

    forced_text: str
    compared: dict[int, TokenComparison]
    """By number of question."""
    blame: Blame | None


def measure(
    sides: tuple[Side, Side], findings: Findings, prompts: tuple[HiddenStates, HiddenStates], work: Path, *,
    options: CheckOptions, report: Report,
) -> Measured:  # fmt: skip
    """Run both models along the same answers, layer by layer; nothing is measured where they read different prompts."""
    forced_text, answers = forced_answers(findings, sides[0].folder, were_imported=options.reference_predictions is not None)
    if findings.structure or not answers:
        return Measured(forced_text, {}, None)
    models, states = tuple(open_model(side.folder) for side in sides), []
    for name, model, own in zip(("reference", "bundle"), models, prompts, strict=True):
        stage = f"{name} along the answers, layers"
        shared = {"folder": work / name, "device": options.device}
        states.append(forced_states(model, own, answers, step=layers_done(report, stage), **shared))
    heads = tuple(LogitsHead(model, options.device) for model in models)
    compared = dict(zip(answers, compare_answers(heads, tuple(states), answers), strict=True))
    if not all(bool(torch.isfinite(each.reference_surprise).all()) for each in compared.values()):
        raise BrokenCheckpoint(f"{sides[0].folder} computes numbers that are not finite; download the checkpoint again")
    pictured = {number: ids for number, ids in answers.items() if findings.tiles[number]}
    places, step = {number: place for place, number in enumerate(answers)}, layers_done(report, "blame, layers")
    known = tuple(lambda number, own=own: own[places[number]] for own in states)
    blame = find_blame(models, heads, prompts, known, pictured, step=step)
    if blame is not None and blame.vision is not None:
        keys = [each.question.key for each in findings.asked]
        tile = worst_tile(keys, places_of(findings, models[0]), prompts, models[0].config.chat.tokens_per_tile)
        blame = replace(blame, tile=tile)
    return Measured(forced_text, compared, blame)


def layers_done(report: Report, stage: str) -> Step:
    """What turns finished layers into progress events."""
    return lambda done, total: report(Event(stage, done, total))


def places_of(findings: Findings, model: Model) -> Iterator[Tensor]:
    """bool [length] of every prompt: where visual tokens stand."""
    image_id = load_tokenizer(model.folder).token_id(model.config.chat.image_token)
    for (_, ids), tiles in zip(findings.prompts, findings.tiles, strict=True):
        yield torch.tensor(ids) == (image_id if tiles else -1)


def forced_answers(findings: Findings, reference: Path, *, were_imported: bool) -> tuple[str, Answers]:
    """Along whose answers distributions are compared, and these by number of question: the best there are."""
    if findings.reference:
        return "imported" if were_imported else "reference", {n: each.ids for n, each in enumerate(findings.reference)}
    right = [None if each.question.gold is None else each.question.gold.answers[0] for each in findings.asked]
    if any(right):
        ids = encoded_answers(right, findings, reference)
        return "gold", {number: own for number, own in enumerate(ids) if own is not None}
    return "bundle", {number: each.ids for number, each in enumerate(findings.quantized)}


def encoded_answers(texts: Sequence[str | None], findings: Findings, reference: Path) -> list[list[int] | None]:
    """Ids of answers, stop token included, as the reference's tokenizer has them after each prompt; None stays None."""
    config, tokenizer = open_model(reference).config, load_tokenizer(reference)
    return [
        None if text is None else encode_answer(text, prompt[0], list(prompt[1]), config=config, tokenizer=tokenizer)
        for text, prompt in zip(texts, findings.prompts, strict=True)
    ]
