"""`vlquant bisect`: the smallest part of a bundle whose return to float ends its FAIL."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vlquant.asking import ROWS
from vlquant.blame import mean_divergence, spread
from vlquant.bundle import Manifest, find_bundle, read_manifest
from vlquant.check import examine, open_sets, sides_of, verdict_of, working_folder
from vlquant.check_options import CheckOptions
from vlquant.comparison import Measured, exported_tile, forced_answers, layer_noises
from vlquant.errors import InvalidRequest
from vlquant.events import Event, Report, silent
from vlquant.examination import Findings
from vlquant.forced import Answers, LogitsHead, Step, compare_answers, forced_states
from vlquant.hidden_states import HiddenStates
from vlquant.kept_answers import KeptAnswer
from vlquant.mixture import Mixture
from vlquant.model import Model, open_model
from vlquant.part_limits import LayerDistance, PartDistances, WorstTile, judge_layers
from vlquant.reference import find_reference
from vlquant.request import EncodedRequest
from vlquant.runtime.features import TileFeatures
from vlquant.runtime.generate import Generation
from vlquant.runtime.loading import layered_decoder
from vlquant.runtime.pipeline import Batch, Pipeline
from vlquant.runtime.vision_session import MissingVision
from vlquant.tokenizer import load_tokenizer
from vlquant.verdict import FAIL, Verdict

VISION = "the vision tower"
Parts = frozenset[int | str]
"""Numbers of layers of the language model, and VISION."""


@dataclass(frozen=True)
class Bisection:
    """What was found."""

    before: Verdict
    parts: tuple[str, ...]
    """The smallest set whose return to float ends the FAIL; empty: there is no FAIL."""
    after: Verdict
    """With these parts in float."""
    gains: tuple[tuple[str, float], ...]
    """By part, how many nats of mean divergence its return alone takes away, largest first."""


def bisect(
    bundle: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    options: CheckOptions = CheckOptions(),
    report: Report = silent,
) -> Bisection:
    """Put parts of a bundle back to float, those first whose return helps most, until its check does not fail any more.

    The arguments are those of `check`. Raises InvalidRequest if the bundle reads other prompts than its reference, which
    no part of it is to blame for, and whatever `check` raises.
    """
    folder = find_bundle(bundle)
    if folder is None:
        raise InvalidRequest("there is no bundle here; name one, or make one with vlquant quantize")
    manifest = read_manifest(folder)
    source = find_reference(manifest, reference, beside=folder)
    sets = open_sets(options)
    sides = sides_of(folder, source, manifest, options, report)
    with working_folder("bisect") as work:
        findings, prompts = examine(sides, sets, manifest, work, options=options, report=report)
        if findings.structure:
            raise InvalidRequest(f"the bundle is not read as its reference ({findings.structure[0]}); quantize the model again")
        _, answers = forced_answers(findings, source, were_imported=options.reference_predictions is not None)
        models = open_model(source), open_model(folder)
        tile = exported_tile(sides[1], models[0], findings, prompts)
        swaps = Swaps(manifest, models, prompts, findings, answers, tile, work, options)
        return search(swaps, report)


@dataclass(frozen=True)
class Swaps:
    """Judges a bundle some of whose parts are in float again."""

    manifest: Manifest
    models: tuple[Model, Model]
    """Reference and bundle; so are the prompts they embedded."""
    prompts: tuple[HiddenStates, HiddenStates]
    findings: Findings
    answers: Answers
    tile: WorstTile | None
    """The vision tower's, while it is as in the bundle."""
    work: Path
    options: CheckOptions

    @cached_property
    def heads(self) -> tuple[LogitsHead, LogitsHead]:
        """Logits of both models."""
        return tuple(LogitsHead(model, self.options.device) for model in self.models)

    @property
    def parts(self) -> list[int | str]:
        """All that can be put back."""
        return [VISION, *range(self.models[0].config.decoder.layers)]

    def divergence(self, parts: Parts) -> float:
        """Mean over the tokens of some answers, in nats; 0 without answers, which only the vision tower fails."""
        some = spread(self.answers)
        if not some:
            return 0.0
        with self._states(parts, some) as (wanted, given):
            return mean_divergence(self.heads, (wanted, given), some)

    def verdict(self, parts: Parts) -> Verdict:
        """As the check would reach it, answers by the mixture included where the bundle answered."""
        with self._states(parts, self.answers) as states:
            compared = dict(zip(self.answers, compare_answers(self.heads, states, self.answers), strict=True))
        findings = self.findings
        if findings.quantized and parts:
            findings = replace(findings, quantized=self._generated(parts))
        return verdict_of(self.manifest, findings, Measured("", compared, None, self._distances(parts)), self.options)

    def _distances(self, parts: Parts) -> PartDistances:
        """Of what is still as in the bundle; a part in float is at no distance."""
        _, layers = self._along_all
        tile = None if VISION in parts else self.tile
        return PartDistances(tuple(each for each in layers if each.layer not in parts), tile)

    @contextmanager
    def _states(self, parts: Parts, answers: Answers) -> Iterator[tuple[HiddenStates, HiddenStates]]:
        """Hidden states of reference and mixture along answers, the mixture's as long as they are needed."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            yield self._reference(answers), self._forced(self._mixture(parts), self._prompts(parts), answers, Path(folder))

    def _reference(self, answers: Answers) -> HiddenStates:
        """The reference's, which no part changes."""
        return self._along_all[0] if len(answers) == len(self.answers) else self._along_some

    @cached_property
    def _along_all(self) -> tuple[HiddenStates, tuple[LayerDistance, ...]]:
        """The reference's states along all answers, and how far the bundle's layers are from its own."""
        noises = layer_noises(self.models, self.findings, self.answers, self.prompts[0], self.options.device)
        folder = Path(tempfile.mkdtemp(dir=self.work))
        states = self._forced(self.models[0], self.prompts[0], self.answers, folder, step=noises.hear)
        return states, judge_layers(noises.found)

    @cached_property
    def _along_some(self) -> HiddenStates:
        folder = Path(tempfile.mkdtemp(dir=self.work))
        return self._forced(self.models[0], self.prompts[0], spread(self.answers), folder)

    def _forced(
        self, model: Model | Mixture, prompts: HiddenStates, answers: Answers, folder: Path, step: Step = lambda passed: None
    ) -> HiddenStates:
        return forced_states(model, prompts, answers, folder=folder, device=self.options.device, step=step)

    def _mixture(self, parts: Parts) -> Mixture:
        return Mixture(self.models[1], self.models[0], frozenset(part for part in parts if part != VISION))

    def _prompts(self, parts: Parts) -> HiddenStates:
        return self.prompts[0 if VISION in parts else 1]

    @torch.inference_mode()
    def _generated(self, parts: Parts) -> list[KeptAnswer]:
        """Greedy answers of the mixture to the embedded prompts."""
        mixture, generation = self._mixture(parts), Generation(max_new_tokens=self.options.max_new_tokens)
        decoder = layered_decoder(mixture, self.options.device)
        pipeline = Pipeline(
            mixture, load_tokenizer(mixture.folder), decoder=decoder, features=TileFeatures(MissingVision(mixture.folder))
        )
        answers, prompts = [], self._prompts(parts)
        for start in range(0, len(prompts.lengths), ROWS):
            rows = [prompts[index] for index in range(start, min(start + ROWS, len(prompts.lengths)))]
            batch = padded(rows, self.options.device)
            decoding = pipeline.decoding(batch, generation)
            for _ in decoding:
                pass
            answers += [pipeline.answer(batch, row, ids, generation) for row, ids in enumerate(decoding.rows)]
        return [KeptAnswer(each.ids, each.text, each.usage.ended_by != "stop") for each in answers]


def padded(prompts: Sequence[Tensor], device: str) -> Batch:
    """Embedded prompts [length, hidden_size] side by side, padded on the left."""
    longest = max(map(len, prompts))
    embeddings = torch.zeros(len(prompts), longest, prompts[0].shape[1], device=device)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        embeddings[row, longest - len(prompt) :] = prompt.to(device)
        mask[row, longest - len(prompt) :] = True
    return Batch([NOTHING] * len(prompts), [()] * len(prompts), embeddings, mask, 0.0)


NOTHING = EncodedRequest("", [], [], [], "")
"""What there is to say of a prompt that is embedded already."""


def search(swaps: Swaps, report: Report) -> Bisection:
    """Parts beyond their own limits, then by what their return gains, taken until the FAIL ends, then left out where it ends without them."""
    before = swaps.verdict(frozenset())
    if before.outcome != FAIL:
        return Bisection(before, (), before, ())
    if swaps.verdict(frozenset(swaps.parts)).outcome == FAIL:
        raise InvalidRequest(
            "the FAIL stays with the vision tower and all layers in float, so that something else of the bundle is broken: "
            "embedding, final norm or head; quantize the model again"
        )
    whole, gains = swaps.divergence(frozenset()), {}
    for number, part in enumerate(swaps.parts, 1):
        gains[part] = whole - swaps.divergence(frozenset((part,)))
        report(Event("parts back to float", number, len(swaps.parts)))
    suspects, chosen, after = accused(before), frozenset(), before
    ranked = sorted(swaps.parts, key=lambda part: (part not in suspects, -gains[part]))
    while after.outcome == FAIL and len(chosen) < len(ranked):
        chosen |= {ranked[len(chosen)]}
        after = swaps.verdict(chosen)
        report(Event("bisect", message=f"{after.outcome} with {', '.join(map(part_name, sort_parts(chosen)))} in float"))
    for part in reversed(ranked[: len(chosen) - 1]):
        without = swaps.verdict(chosen - {part})
        if without.outcome != FAIL:
            chosen, after = chosen - {part}, without
    helpful = sorted(gains.items(), key=lambda each: -each[1])
    return Bisection(
        before, tuple(map(part_name, sort_parts(chosen))), after, tuple((part_name(part), gain) for part, gain in helpful)
    )


def accused(verdict: Verdict) -> Parts:
    """Parts that are beyond limits of their own."""
    vision = {VISION} if verdict.parts.tile and verdict.parts.tile.is_broken else set()
    return frozenset(vision | {each.layer for each in verdict.parts.layers if each.is_broken})


def sort_parts(parts: Parts) -> list[int | str]:
    """The vision tower first, then layers in order."""
    return sorted(parts, key=lambda part: -1 if part == VISION else part)


def part_name(part: int | str) -> str:
    """A part in words; layers are counted from 0, as in the manifest."""
    return part if part == VISION else f"layer {part}"
