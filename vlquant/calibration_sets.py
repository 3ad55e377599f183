"""Which conversations a recipe calibrates on: sets by their names and files, taken in turns, and what identifies them."""

import hashlib
import os
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
from vlquant.config import ModelConfig
from vlquant.errors import InvalidRequest
from vlquant.events import Event, Report
from vlquant.fitting import fitting_request, prompt_ids, reaches_answer
from vlquant.recipe import Recipe
from vlquant.request import is_file
from vlquant.runtime.reader import position_limit
from vlquant.runtime.video import with_frames
from vlquant.tokenizer import Tokenizer

READERS = {".jsonl": FinetuningSet, ".json": FinetuningSet, ".tsv": TsvFile}
BY_NAME = ("builtin", "photos")
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
    answers: Mapping[int, "WrittenAnswer"] = field(default_factory=dict)
    """Answers to those, written since."""

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> Conversation:
        conversation = read_pick(self.picks[index])
        if index not in self.answers:
            return conversation
        written = self.answers[index]
        return replace(conversation, answer=written.text, cut=written.cut, generated=True)


@dataclass(frozen=True)
class WrittenAnswer:
    """What a model answers."""

    text: str
    cut: bool
    """Whether it was interrupted before it was done."""


def choose_conversations(recipe: Recipe, report: Report) -> ChosenConversations:
    """Open a recipe's calibration sets and read what it takes of them once, to know that all can be read and what it is.

    Raises InvalidRequest naming file, line and reason, or MissingDependency.
    """
    require_different(recipe.calibration)
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


def require_different(names: Sequence[str]) -> None:
    """Raise InvalidRequest for a set that is named twice, by whatever path: its conversations would count twice."""
    known = set()
    for name in names:
        identity = name if name in BY_NAME else os.path.realpath(name)
        if identity in known:
            raise InvalidRequest(f"--calib {name}: this set is named twice; name each set once")
        known.add(identity)


def require_encodable(
    chosen: ChosenConversations | None, config: ModelConfig, tokenizer: Tokenizer, recipe: Recipe, report: Report
) -> None:
    """Tokenize all conversations once, pictures by their size alone, to know that the model can be given them.

    Raises InvalidRequest naming file, line and reason; says how many conversations are so long that no answer is seen.
    """
    if chosen is None:
        return
    lost, most, limit = 0, {"most_tokens": recipe.tokens}, position_limit(config.decoder)
    for index in range(len(chosen)):
        conversation = chosen[index]
        with named(conversation.key):
            request = fitting_request(conversation, config, tokenizer, **most)
            length = len(prompt_ids(request, config, tokenizer))
            if conversation.answer is None and length > limit:
                raise InvalidRequest(
                    f"the question has {length} tokens with all before it, and the model, which is to answer it, takes at most "
                    f"{limit}; shorten it, or give its answer"
                )
            lost += not reaches_answer(request, config, tokenizer, **most)
        report(Event("calibration texts", index + 1, len(chosen)))
    if lost:
        message = f"{lost} of {len(chosen)} conversations are too long for their answer to be seen"
        message += f"; give more --tokens than {recipe.tokens}"
        report(Event("calibration texts", message=message))


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
    if os.path.isdir(path):
        return folder_photographs(path)
    if not is_file(path):
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
