"""Sets of pictures with questions, the same everywhere for the same split, seed and index."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from vlquant.calib_data import drawing
from vlquant.calib_data.conversations import Conversation
from vlquant.calib_data.drawing import Picture
from vlquant.calib_data.scenes import SCENES, TRAINING_SCENES, Question
from vlquant.request import Request

KINDS = tuple(SCENES)
SPLITS = ("train", "calibration", "development", "check")


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
    """Scenes of the calibration split, each with all its questions, one after the other: answers are what pictures are rich in."""

    count: int
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        sample = draw_sample("calibration", index, seed=self.seed)
        first = index % len(sample.questions)
        *earlier, last = sample.questions[first:] + sample.questions[:first]
        request = replace(sample_request(sample, last), history=[(each.text, each.answer) for each in earlier])
        return Conversation(sample.key, request, last.answer)
