"""Reference and bundle token by token along the same answers, one layer of either in memory; and where they part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlquant.blame import find_blame, spread
from vlquant.bundle import read_manifest
from vlquant.check_options import CheckOptions
from vlquant.check_result import Blame
from vlquant.distributions import TokenComparison
from vlquant.errors import BrokenCheckpoint
from vlquant.events import Event, Report
from vlquant.examination import Findings, Side
from vlquant.forced import Answers, LayerPassed, LogitsHead, Step, compare_answers, forced_states
from vlquant.hidden_states import HiddenStates
from vlquant.model import Model, open_model
from vlquant.part_distances import LayerNoises, PlainRounding, worst_tile
from vlquant.part_limits import PartDistances, WorstTile, judge_layers
from vlquant.request import encode_answer
from vlquant.tokenizer import load_tokenizer
from vlquant.vision_manifest import ACCEPTED


@dataclass(frozen=True)
class Measured:
    """How far distributions are apart, and where that comes from."""

    forced_text: str
    compared: dict[int, TokenComparison]
    """By number of question."""
    blame: Blame | None
    parts: PartDistances = PartDistances()


def measure(
    sides: tuple[Side, Side], findings: Findings, prompts: tuple[HiddenStates, HiddenStates], work: Path, *,
    options: CheckOptions, report: Report,
) -> Measured:  # fmt: skip
    """Run both models along the same answers, layer by layer; nothing is measured where they read different prompts."""
    models, states = tuple(open_model(side.folder) for side in sides), []
    forced_text, answers = forced_answers(findings, sides[0].folder, were_imported=options.reference_predictions is not None)
    tile = None if findings.structure else exported_tile(sides[1], models[0], findings, prompts)
    if findings.structure or not answers:
        return Measured(forced_text, {}, None, PartDistances(tile=tile))
    noises = layer_noises(models, findings, answers, prompts[0], options.device)
    for name, model, own, heard in zip(("reference", "bundle"), models, prompts, ([noises.hear], []), strict=True):
        step = told(*heard, layers_done(report, f"{name} along the answers, layers"))
        states.append(forced_states(model, own, answers, folder=work / name, device=options.device, step=step))
    heads = tuple(LogitsHead(model, options.device) for model in models)
    compared = dict(zip(answers, compare_answers(heads, tuple(states), answers), strict=True))
    if not all(bool(torch.isfinite(each.reference_surprise).all()) for each in compared.values()):
        raise BrokenCheckpoint(f"{sides[0].folder} computes numbers that are not finite; download the checkpoint again")
    pictured = {number: ids for number, ids in answers.items() if findings.tiles[number]}
    places = {number: place for place, number in enumerate(answers)}
    known = tuple(lambda number, own=own: own[places[number]] for own in states)
    blame = find_blame(models, heads, prompts, known, pictured, step=lambda *done: report(Event("blame, layers", *done)))
    return Measured(forced_text, compared, blame, PartDistances(judge_layers(noises.found), tile))


def layers_done(report: Report, stage: str) -> Step:
    """What turns finished layers into progress events."""
    return lambda passed: report(Event(stage, passed.index + 1, passed.layers))


def told(*steps: Step) -> Step:
    """All of them, one after the other."""

    def step(passed: LayerPassed) -> None:
        for each in steps:
            each(passed)

    return step


def layer_noises(
    models: tuple[Model, Model], findings: Findings, answers: Answers, prompts: HiddenStates, device: str
) -> LayerNoises:
    """What is to hear of the reference's layers along these answers; it looks at some of them. prompts: the reference's."""
    some = spread(answers)
    asked = {
        place: (findings.asked[number].set, findings.asked[number].question.picture)
        for place, number in enumerate(answers)
        if number in some
    }
    rounded = PlainRounding(models[0], read_manifest(models[1].folder), device)
    return LayerNoises(models[1], rounded, asked, [prompts.lengths[number] for number in answers])


def exported_tile(
    side: Side, reference: Model, findings: Findings, prompts: tuple[HiddenStates, HiddenStates]
) -> WorstTile | None:
    """The tile that the bundle's exported vision tower changes most; None if it is not exported, or changes none."""
    if side.vision not in ACCEPTED:
        return None
    keys, tokens = [each.question.key for each in findings.asked], reference.config.chat.tokens_per_tile
    return worst_tile(keys, places_of(findings, reference), prompts, tokens_per_tile=tokens, precision=side.vision)


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
