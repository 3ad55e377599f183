"""Reference and bundle, one after the other, through the same questions: what each reads and answers. Reaches no verdict.

Only one of the two models is in memory at a time.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from vlquant.asking import Asked, Seen, Subject, identity, repeat_otherwise
from vlquant.calib_data.check_questions import CheckQuestion, CheckSet
from vlquant.calib_data.conversations import picture_name
from vlquant.config import read_config
from vlquant.errors import InvalidRequest
from vlquant.hidden_states import HiddenStates
from vlquant.kept_answers import KeptAnswer, kept_answers
from vlquant.metrics import METRICS, Score
from vlquant.request import EncodedRequest, encode_request, open_image
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import load
from vlquant.runtime.reader import open_reader
from vlquant.runtime.video import with_frames
from vlquant.structure import stop_faults, structure_faults
from vlquant.tiling import Box
from vlquant.tokenizer import load_tokenizer

MOST_FAULTS = 5
"""Differences of structure that are named; one is enough."""
MOST_CARDS = 24
"""Disagreements whose pictures are kept, of those that cost something and of the others each."""
LONGEST_SIDE = 640
"""Of a picture that is kept, in pixels."""
Step = Callable[[int], None]
"""Hears how many questions were shown."""


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    folder: Path
    vision: str
    """"fp32", "fp16", "int8" or "torch"."""
    files: Mapping[str, str]
    """Hashes by which its answers are known again."""
    answers: bool
    """Whether it is loaded as a whole, to answer by itself."""


@dataclass(frozen=True)
class Picture:
    """A picture, made smaller, and what each tile shows of it."""

    image: Image.Image
    boxes: tuple[Box, ...]


@dataclass
class Findings:
    """What was found, question by question in the order they were asked."""

    asked: list[Asked] = field(default_factory=list)
    prompts: list[tuple[str, Sequence[int]]] = field(default_factory=list)
    """Prompt text and ids, as the reference reads them."""
    tiles: list[int] = field(default_factory=list)
    """How many tiles each shows."""
    reference: list[KeptAnswer] = field(default_factory=list)
    """Empty: it did not answer."""
    quantized: list[KeptAnswer] = field(default_factory=list)
    structure: list[str] = field(default_factory=list)
    """Sentences of what is read otherwise, the first MOST_FAULTS."""
    repeated: tuple[int, int, float] | None = None
    """Questions that the reference was asked again in smaller batches, changed answers, mean divergence."""
    pictures: dict[int, list[Picture]] = field(default_factory=dict)
    """Of some questions with different answers, by number."""


def grade(asked: Asked, text: str) -> Score | None:
    """The score of an answer; None if no right one is known."""
    question = asked.question
    return None if question.gold is None else METRICS[question.metric](text, question.gold)


def open_side(side: Side, generation: Generation, device: str) -> Subject:
    """A model as far as it is needed, with the answers it gave in earlier runs."""
    reader = (load if side.answers else open_reader)(side.folder, device, vision=side.vision)
    settings = {"vision": side.vision, "device": device, "generation": asdict(generation)}
    return Subject(reader, generation, kept_answers(identity(side.files, **settings)))


@dataclass(frozen=True)
class Examination:
    """The same questions for both models."""

    sets: Sequence[CheckSet]
    generation: Generation
    device: str
    findings: Findings

    def of_reference(self, side: Side, folder: Path, *, calibrated: frozenset[str], step: Step) -> HiddenStates:
        """Show the sets to the reference; returns its embedded prompts, in `folder`.

        calibrated: pictures by `picture_name` that may not be asked about. Raises InvalidRequest if one is: the bundle
        would do too well there.
        """
        subject, findings = open_side(side, self.generation, self.device), self.findings

        def note(seen: Seen) -> None:
            for each in seen.questions:
                require_unseen(each, calibrated)
            findings.asked += seen.asked
            findings.prompts += [(each.prompt, array("i", each.ids)) for each in seen.encoded]
            findings.tiles += [len(each.tiles) for each in seen.encoded]
            findings.reference += seen.answers or []
            if seen.answers and findings.repeated is None:
                findings.repeated = len(seen.asked), *repeat_otherwise(subject.pipeline, seen, self.generation)
            step(len(seen.asked))

        return subject.show(self.sets, folder, note=note)

    def of_bundle(self, side: Side, folder: Path, *, reference: Path, step: Step) -> HiddenStates:
        """Show them to the bundle, held against what the `reference` folder's tokenizer and settings make of them."""
        subject, findings = open_side(side, self.generation, self.device), self.findings
        own, other = (subject.reader.config, subject.reader.tokenizer), (read_config(reference), load_tokenizer(reference))
        findings.structure += stop_faults(other, own)

        def note(seen: Seen) -> None:
            for asked, question, encoded in zip(seen.asked, seen.questions, seen.encoded, strict=True):
                wanted = encode_request(with_frames(question.request), *other)
                findings.structure += structure_faults(asked.question.key, wanted, encoded)
            del findings.structure[MOST_FAULTS:]
            start = len(findings.quantized)
            findings.quantized += seen.answers or []
            if seen.answers and findings.reference:
                keep_pictures(findings, seen, start)
            step(len(seen.asked))

        return subject.show(self.sets, folder, note=note)


def require_unseen(question: CheckQuestion, calibrated: frozenset[str]) -> None:
    """Raise InvalidRequest if the bundle was calibrated on a picture of the question."""
    if calibrated and not calibrated.isdisjoint(map(picture_name, shown_pictures(question))):
        raise InvalidRequest(
            f"the bundle was calibrated on a picture of {question.key}; "
            "check with another --set or --seed, or quantize with other pictures"
        )


def shown_pictures(question: CheckQuestion) -> list[Image.Image]:
    """Pictures and frames of a question, those of a video file left out: they are nowhere calibrated on."""
    video = question.request.video
    frames = () if video is None or isinstance(video, str | Path) else video
    return [open_image(each) for each in (*question.request.images, *frames)]


def keep_pictures(findings: Findings, seen: Seen, start: int) -> None:
    """Keep small copies of the pictures of disagreements, so many of each kind as are shown at most."""
    for offset, (question, encoded) in enumerate(zip(seen.questions, seen.encoded, strict=True)):
        number = start + offset
        if findings.reference[number].text == findings.quantized[number].text:
            continue
        costly = is_lost(findings, number)
        if sum(is_lost(findings, each) == costly for each in findings.pictures) < MOST_CARDS:
            findings.pictures[number] = list(small_pictures(question, encoded))


def is_lost(findings: Findings, number: int) -> bool:
    """Whether the bundle's answer scores less than the reference's."""
    scores = [grade(findings.asked[number], each[number].text) for each in (findings.reference, findings.quantized)]
    return None not in scores and scores[1].value < scores[0].value


def small_pictures(question: CheckQuestion, encoded: EncodedRequest) -> Iterator[Picture]:
    """The pictures of a question, no longer than LONGEST_SIDE, with their tiles."""
    for image, boxes in zip(shown_pictures(question), encoded.tile_map, strict=False):
        scale = min(1.0, LONGEST_SIDE / max(image.size))
        size = tuple(max(1, round(side * scale)) for side in image.size)
        yield Picture(image.resize(size), tuple(tuple(round(edge * scale) for edge in box) for box in boxes))
