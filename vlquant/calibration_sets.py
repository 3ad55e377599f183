"""Which conversations a recipe calibrates on: sets by their names and files, taken in turns, and what identifies them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlquant.calib_data.conversations import (
    NAME_DIGITS,
    Conversation,
    ConversationSet,
    Pick,
    conversation_hash,
    in_turn,
    named,
    pictures_of,
    pixel_hash,
    shuffled,
)
from vlquant.calib_data.finetuning import FinetuningSet
from vlquant.calib_data.photographs import folder_photographs, installed_photographs
from vlquant.calib_data.samples import CalibrationScenes
from vlquant.calib_data.tsv import TsvFile
from vlquant.errors import InvalidRequest
from vlquant.events import Event, Report
from vlquant.recipe import Recipe
from vlquant.runtime.video import with_frames

READERS = {".jsonl": FinetuningSet, ".json": FinetuningSet, ".tsv": TsvFile}
KNOWN_SETS = "use builtin, photos, a .jsonl or .json file (InternVL fine-tuning), a .tsv file (VLMEvalKit) or a folder of pictures"


@dataclass(frozen=True)
class ChosenConversations:
    """The conversations of a recipe, each read anew when it is asked for."""

    picks: Sequence[Pick]
    sha256: str
    """Of their pixels and texts."""
    pictures: tuple[str, ...]
    """Their pictures, each by its short hash."""
    unanswered: tuple[int, ...]
    """Which of them came without an answer."""
    answers: Mapping[int, str] = field(default_factory=dict)
    """Answers to those, written since."""

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> Conversation:
        conversation = read_pick(self.picks[index])
        return replace(conversation, answer=self.answers[index]) if index in self.answers else conversation


def choose_conversations(recipe: Recipe, report: Report) -> ChosenConversations:
    """Open a recipe's calibration sets and read what it takes of them once, to know that all can be read and what it is.

    Raises InvalidRequest naming file, line and reason, or MissingDependency.
    """
    sets = [open_picks(name, recipe) for name in recipe.calibration]
    picks = in_turn(sets, recipe.samples)
    if len(picks) < recipe.samples:
        message = f"the calibration data holds {len(picks)} conversations, fewer than the {recipe.samples} asked for: all are used"
        report(Event("calibration data", message=message))
    digest, pictures, unanswered = hashlib.sha256(), set(), []
    for index, pick in enumerate(picks):
        conversation = read_pick(pick)
        hashes = [pixel_hash(image) for image in pictures_of(conversation)]
        digest.update(conversation_hash(conversation, hashes).encode())
        pictures.update(each[:NAME_DIGITS] for each in hashes)
        unanswered += [index] * (conversation.answer is None)
        report(Event("calibration data", index + 1, len(picks)))
    return ChosenConversations(picks, digest.hexdigest(), tuple(sorted(pictures)), tuple(unanswered))


def open_picks(name: str, recipe: Recipe) -> list[Pick]:
    """What a recipe can take of one of its sets, in the order it takes it."""
    if name == "builtin":
        scenes = CalibrationScenes(recipe.samples, recipe.seed)
        return [(scenes, index) for index in range(recipe.samples)]
    return shuffled(open_set(name), recipe.samples, seed=recipe.seed)


def open_set(name: str) -> ConversationSet:
    """The calibration set of a name, file or folder; raises InvalidRequest if there is none."""
    if name == "photos":
        return installed_photographs()
    path = Path(name)
    if path.is_dir():
        return folder_photographs(path)
    if not path.is_file():
        raise InvalidRequest(f"--calib {name}: there is no such set, file or folder; {KNOWN_SETS}")
    if path.suffix.lower() not in READERS:
        raise InvalidRequest(f"--calib {name}: this kind of file is not known; {KNOWN_SETS}")
    return READERS[path.suffix.lower()](path)


def read_pick(pick: Pick) -> Conversation:
    """A conversation of a set, its video decoded."""
    conversations, index = pick
    conversation = conversations[index]
    with named(conversation.key):
        return replace(conversation, request=with_frames(conversation.request))
