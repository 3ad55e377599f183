"""Show a check set to one model: what it reads, what it answers. Knows no other model, no score and no verdict."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

import vlquant
from vlquant.calib_data.check_questions import CheckQuestion, CheckSet
from vlquant.calib_data.conversations import named
from vlquant.distributions import compare_logits
from vlquant.hidden_states import HiddenStates, write_states
from vlquant.kept_answers import KeptAnswer, KeptAnswers, question_key
from vlquant.request import EncodedRequest
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import Pipeline
from vlquant.runtime.reader import Features, Reader

ROWS = 48
"""Questions answered side by side."""
FEWER_ROWS = 5
"""Side by side where the reference is set beside itself."""


@dataclass(frozen=True)
class Asked:
    """A question of a set, its pictures let go."""

    set: str
    question: CheckQuestion


@dataclass(frozen=True)
class Seen:
    """Some questions as a model was shown them."""

    asked: list[Asked]
    questions: list[CheckQuestion]
    """The same with their pictures."""
    encoded: list[EncodedRequest]
    features: list[Features]
    answers: list[KeptAnswer] | None
    """None: this model only reads."""


def question_batches(sets: Iterable[CheckSet]) -> Iterator[tuple[list[Asked], list[CheckQuestion]]]:
    """Questions of all sets, ROWS at a time; the next ones about the same picture find its features known."""
    for each in sets:
        questions = chain.from_iterable(each.groups())
        while batch := list(islice(questions, ROWS)):
            yield light(each.name, batch), batch


def light(set_name: str, questions: Sequence[CheckQuestion]) -> list[Asked]:
    """Questions without their pictures."""
    return [Asked(set_name, replace(each, request=replace(each.request, images=(), video=None))) for each in questions]


class Subject:
    """One of the models that are compared: how it reads, and where it may, answers."""

    def __init__(self, reader: Reader, generation: Generation, kept: KeptAnswers):
        self.reader, self.generation, self.kept = reader, generation, kept
        self.pipeline = reader if isinstance(reader, Pipeline) else None

    def show(self, sets: Sequence[CheckSet], folder: Path, *, note: Callable[[Seen], None]) -> HiddenStates:
        """Show all questions; `note` hears of each batch. Returns the embedded prompts, in a file in `folder`."""
        path = folder / "prompts.f32"
        width = self.reader.config.decoder.hidden_size
        return HiddenStates(path, write_states(path, self._embedded(sets, note)), width)

    def _embedded(self, sets: Sequence[CheckSet], note: Callable[[Seen], None]) -> Iterator[Tensor]:
        for asked, questions in question_batches(sets):
            encoded = [self._encode(each) for each in questions]
            features = self.reader.features(encoded)
            note(Seen(asked, questions, encoded, features, self._answers(encoded, features)))
            for each, visual in zip(encoded, features, strict=True):
                yield self.reader.embed(each, visual)

    def _encode(self, question: CheckQuestion) -> EncodedRequest:
        with named(question.key):
            return self.reader.encode(question.request)

    def _answers(self, encoded: list[EncodedRequest], features: list[Features]) -> list[KeptAnswer] | None:
        """Greedy answers, those from earlier runs among them; a batch is answered as a whole, or it would answer otherwise."""
        if self.pipeline is None:
            return None
        keys = [question_key(each) for each in encoded]
        known = [self.kept.get(key) for key in keys]
        if None in known:
            answers = self.pipeline.batch(encoded, self.generation, features=features)
            known = [KeptAnswer(each.ids, each.text, each.usage.ended_by != "stop") for each in answers]
            self.kept.add(dict(zip(keys, known, strict=True)))
        return known


@torch.inference_mode()
def repeat_otherwise(pipeline: Pipeline, seen: Seen, generation: Generation) -> tuple[int, float]:
    """What a model answers to the same questions in smaller batches: changed answers, and the mean divergence in nats."""
    ids = [each.ids for each in seen.answers]
    together = pipeline.answer_logits(seen.encoded, ids, features=seen.features)
    changed, divergences = 0, []
    for start in range(0, len(ids), FEWER_ROWS):
        part = slice(start, start + FEWER_ROWS)
        shown, features = seen.encoded[part], seen.features[part]
        again = pipeline.batch(shown, generation, features=features)
        changed += sum(one.text != other.text for one, other in zip(seen.answers[part], again, strict=True))
        logits = pipeline.answer_logits(shown, ids[part], features=features)
        pairs = zip(together[part], logits, ids[part], strict=True)
        divergences += [compare_logits(wanted, given, own).divergence for wanted, given, own in pairs]
    return changed, float(torch.cat(divergences).mean())


def identity(files: Mapping[str, str], **settings: object) -> dict:
    """What decides the answers of a model with files of these hashes, ready for JSON."""
    versions = {"vlquant": vlquant.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"files": dict(files), **settings, **versions}
