"""The chat verb: an answer on standard output as it is generated, or a conversation in the terminal."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vlquant.config import MANIFEST_FILE
from vlquant.counting import counted
from vlquant.errors import InvalidRequest, VlquantError
from vlquant.prompt import IMAGE_PLACEHOLDER
from vlquant.request import Request, open_image
from vlquant.runtime.answer import Answer, History
from vlquant.runtime.generate import Generation
from vlquant.runtime.messages import Prompt, as_request, with_placeholders
from vlquant.runtime.native_decoder import NativeDecoder
from vlquant.runtime.packed_weights import not_kept
from vlquant.runtime.pipeline import Pipeline, load
from vlquant.runtime.video import read_frames
from vlquant.vision_manifest import has_exported_tower

COMMANDS = "/image FILE adds a picture, /reset starts anew, /quit leaves"


def chat(
    question: Prompt,
    *,
    model: str | Path | None = None,
    device: str = "cpu",
    vision: str | None = None,
    generation: Generation = Generation(),
    report: Callable[[str], None] | None = None,
    **loading,
) -> Answer | None:
    """Answer `question` on standard output token by token; if its text is empty, converse until the input ends.

    model: bundle or checkpoint, None: the bundle here; vision: as `load` takes it, None: ONNX where it was exported or
    the model is a bundle; report: takes remarks, which never go to standard output; loading: max_tiles, prompt and tokenizer,
    as `load` takes them. Returns the answer to a question, None after a conversation. Raises VlquantError.
    """
    report = report or (lambda line: print(line, file=sys.stderr))
    _require_readable(as_request(question))
    vision = vision or default_vision(model)
    pipeline = load(model, device, vision=vision, **loading)
    request = as_request(question, pipeline.config.chat.conversation)
    for line in [*introduction(pipeline, device), *remarks(request)]:
        report(line)
    if request.question:
        return _print_answer(pipeline, request, generation)
    report(COMMANDS)
    _converse(pipeline, Conversation(request, numbered=pipeline.config.chat.conversation.numbers_pictures), generation)
    return None


def default_vision(model: str | Path | None) -> str:
    """The exported tower of a bundle, "onnx"; "torch" for a checkpoint without one, as one to download always is."""
    folder = Path(model or ".")
    bundle = model is None or (folder / MANIFEST_FILE).is_file()
    return "onnx" if bundle or has_exported_tower(folder) else "torch"


def _require_readable(request: Request) -> None:
    """Raise InvalidRequest for a bad picture or video now: loading the model takes longer."""
    for picture in request.images:
        open_image(picture)
    if isinstance(request.video, str | os.PathLike):
        read_frames(request.video, 1)


def introduction(pipeline: Pipeline, device: str) -> list[str]:
    """Who answers, and through what."""
    names = f"decoder: {pipeline.decoder.name}, vision tower: {pipeline.tile_features.session.name}"
    lines = [f"model {pipeline.model.folder} on {device}; {names}"]
    if isinstance(pipeline.decoder, NativeDecoder) and (remark := not_kept(pipeline.model.folder)):
        lines.append(remark)
    return lines


def remarks(request: Request) -> list[str]:
    """What is not refused, because the original takes it, and yet hardly meant."""
    texts = [question for question, _ in request.history or ()] + [request.question]
    places = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if request.video is not None or places <= len(request.images):
        return []
    pictures = counted(len(request.images), "picture")
    return [f"the text has {places} {IMAGE_PLACEHOLDER} for {pictures}: what is over stays text; give a picture for each, or take it out"]


@dataclass
class Conversation:
    """What the next question is asked with: everything shown and said so far."""

    opening: Request
    """Pictures, video and settings given with the command; without a question."""
    numbered: bool = True
    """Whether the prompt's form numbers the pictures of one question."""
    images: tuple = ()
    history: History | None = None
    fresh: int = 0
    """Pictures, last in `images`, that no question has been about yet."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to what the command gave."""
        self.images, self.history = tuple(self.opening.images), None
        self.fresh = len(self.images)

    def show(self, file: str) -> None:
        """Add a picture to the next question. Raises InvalidRequest if that is impossible."""
        if not file:
            raise InvalidRequest("/image needs a picture; write /image FILE")
        if self.opening.video is not None:
            raise InvalidRequest("this conversation is about a video; start another one for pictures")
        path = str(Path(file).expanduser())
        open_image(path)  # A picture that cannot be read would end every turn from now on.
        self.images, self.fresh = (*self.images, path), self.fresh + 1

    def ask(self, text: str) -> Request:
        """The request of the next turn."""
        # The numbering starts again in every turn: the template names pictures within one question.
        question = with_placeholders(text, self.fresh, numbered=self.numbered) if self.opening.video is None else text
        return replace(self.opening, question=question, images=self.images, history=self.history)

    def take_back(self) -> int:
        """Forget the pictures that no question has been about yet; how many they were."""
        count, self.fresh = self.fresh, 0
        self.images = self.images[: len(self.images) - count]
        return count

    def heard(self, answer: Answer) -> None:
        """Remember a turn."""
        self.history, self.fresh = answer.history, 0


def _converse(pipeline: Pipeline, conversation: Conversation, generation: Generation) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    while True:
        try:
            line = console.input("[bold]> [/bold]" if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                console.print()  # The shell's prompt begins a line of its own.
            return
        if line == "/quit":
            return
        try:
            _take(line, pipeline, conversation, generation)
        except VlquantError as error:
            console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("interrupted; this turn is forgotten", style="dim")


def _take(line: str, pipeline: Pipeline, conversation: Conversation, generation: Generation) -> None:
    """Carry out one line of input."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        conversation.show(rest.strip())
    elif command == "/reset":
        conversation.reset()
    elif command.startswith("/") and "/" not in command[1:]:
        raise InvalidRequest(f"{command} is unknown; {COMMANDS}")
    elif line:
        try:
            conversation.heard(_print_answer(pipeline, conversation.ask(line), generation))
        except VlquantError as error:
            if not (taken := conversation.take_back()):
                raise
            raise InvalidRequest(f"{error} (taken back: {counted(taken, 'picture')}; show them again with /image)") from error


def _print_answer(pipeline: Pipeline, request: Request, generation: Generation) -> Answer:
    stream = pipeline.stream(request, generation=generation)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return stream.answer
