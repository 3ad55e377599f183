"""Sets of pictures with questions, the same everywhere for the same split, seed and index."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from vlquant.calib_data import drawing
from vlquant.calib_data.conversations import Conversation
from vlquant.calib_data.descriptions import description
from vlquant.calib_data.dialogue import Turn, dialogue
from vlquant.calib_data.drawing import Picture
from vlquant.calib_data.scenes import SCENES, TRAINING_SCENES, Question
from vlquant.calib_data.screens import screen
from vlquant.request import Request

KINDS = tuple(SCENES)
SPLITS = ("train", "calibration", "development", "check")
CALIBRATION_TURNS = (
    "document", "dialogue_en", "receipt", "screen", "chart", "dialogue_zh", "text", "count",
    "dialogue_en", "yes_no", "screen", "choice", "dialogue_zh", "locate", "several", "video", "text_only",
)  # fmt: skip
"""Kinds of conversations, in turn: all of KINDS in their order, and others in between.

So many that all take their turn at being held out as well, which every sixteenth conversation is.
"""


@dataclass(frozen=True)
class Sample:
    """One scene: pictures (or video frames) and the questions about them."""

    key: str
    """Names the scene within all sets; answers about one scene are not independent."""
    kind: str
    pictures: tuple[Picture, ...]
    video: bool
    questions: tuple[Question, ...]

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures as PIL images."""
        return tuple(picture.image for picture in self.pictures)


def draw_sample(split: str, index: int, *, seed: int = 0, kinds: Sequence[str] = KINDS) -> Sample:
    """Scene number `index` of a split; kinds take turns."""
    kind = kinds[index % len(kinds)]
    key = f"{split}/{seed}/{index}/{kind}"
    chance = random.Random(key)
    scene = TRAINING_SCENES[kind](chance)
    # Half of the scenes are not multiples of a tile, so that tiling has to resize them.
    scale = 1.0 if chance.random() < 0.5 else chance.uniform(0.92, 1.05)
    pictures = tuple(drawing.rescale(each, scale) if scale != 1.0 else each for each in scene.pictures)
    return Sample(key, kind, pictures, scene.video, scene.questions)


def samples(split: str, count: int, *, seed: int = 0, kinds: Sequence[str] = KINDS) -> Iterator[Sample]:
    """The first `count` scenes of a split ("train", "calibration", "development" or "check")."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    for index in range(count):
        yield draw_sample(split, index, seed=seed, kinds=kinds)


def set_hash(split: str, count: int, *, seed: int = 0) -> str:
    """Identity of a set: sha256 over its pixels, questions and answers."""
    digest = hashlib.sha256()
    for sample in samples(split, count, seed=seed):
        digest.update(sample.key.encode())
        for image in sample.images:
            digest.update(repr(image.size).encode() + image.tobytes())
        for question in sample.questions:
            digest.update(f"{question.text}\n{question.answer}\n".encode())
    return digest.hexdigest()


def sample_request(sample: Sample, question: Question) -> Request:
    """One question of a scene as a runtime takes it."""
    if sample.video:
        return Request(question.text, video=sample.images)
    return Request(question.text, images=sample.images)


@dataclass(frozen=True)
class CalibrationScenes:
    """Scenes of the calibration split and drawn screens, each with all its questions, and dialogue without pictures between them."""

    count: int
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        rounds, turn = divmod(index, len(CALIBRATION_TURNS))
        kind = CALIBRATION_TURNS[turn]
        own = [place for place, each in enumerate(CALIBRATION_TURNS) if each == kind]
        number = rounds * len(own) + own.index(turn)
        key = f"calibration/{self.seed}/{number}/{kind}"
        if kind.startswith("dialogue"):
            return conversation(key, Request(""), dialogue(kind.removeprefix("dialogue_"), number, seed=self.seed))
        if kind == "screen":
            scene = screen(random.Random(key))
            sample = Sample(key, kind, scene.pictures, scene.video, scene.questions)
        else:
            sample = draw_sample("calibration", rounds * len(KINDS) + KINDS.index(kind), seed=self.seed)
        questions = sample.questions + description(kind, sample.questions)
        first = index % len(questions)
        turns = [(each.text, each.answer) for each in questions[first:] + questions[:first]]
        return conversation(sample.key, sample_request(sample, questions[0]), turns)


def conversation(key: str, about: Request, turns: Sequence[Turn]) -> Conversation:
    """Questions and answers one after the other about the pictures of a request."""
    *earlier, (question, answer) = turns
    return Conversation(key, replace(about, question=question, history=earlier), answer)
