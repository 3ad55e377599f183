"""`vlquant compare`: two models, each in a process of its own, answer the same question side by side."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from multiprocessing.connection import Connection
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from vlquant.errors import BrokenCheckpoint, VlquantError
from vlquant.machine import peak_memory
from vlquant.request import Request
from vlquant.runtime.chat import default_vision
from vlquant.runtime.generate import Generation

CHANGED = "bold yellow"
"""How words are drawn that the other answer does not have there; they are underlined too."""


@dataclass(frozen=True)
class Told:
    """What one model said, and what that took."""

    name: str
    text: str = ""
    tokens: int = 0
    first_token_seconds: float | None = None
    """From the question to the first token, vision included; the model was loaded before."""
    tokens_per_second: float | None = None
    """Of the tokens after the first."""
    peak_bytes: int | None = None
    """VmHWM of its process; None where the system does not tell."""
    done: bool = False


def compare(
    models: Sequence[str | Path],
    request: Request,
    *,
    generation: Generation = Generation(),
    device: str = "cpu",
    console: Console | None = None,
    **loading,
) -> tuple[Told, Told]:
    """Answer `request` by two bundles or checkpoints, one after the other, and draw both as they come.

    loading: max_tiles, prompt and tokenizer, as `load` takes them. Raises VlquantError for what either cannot do.
    """
    console = console or Console()
    told = [Told(Path(name).name) for name in models]
    with Live(side_by_side(told), console=console, auto_refresh=False, transient=True) as live:
        for place, name in enumerate(models):
            for told[place] in answering(name, request, generation, device=device, **loading):
                live.update(side_by_side(told), refresh=console.is_terminal)
    console.print(side_by_side(told))
    return tuple(told)


def answering(name: str | Path, request: Request, generation: Generation, **loading) -> Iterator[Told]:
    """What a model says so far, again and again; it runs in a process of its own, so that its memory can be told."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=answer_elsewhere, args=(there, name, request, generation, loading), daemon=True)
    process.start()
    there.close()
    try:
        while True:
            heard = here.recv()
            if isinstance(heard, VlquantError):
                raise heard
            yield heard
            if heard.done:
                break
    except EOFError:
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        reason = "was killed, probably for want of memory; take a smaller model" if killed else "failed; its error is printed above"
        raise BrokenCheckpoint(f"the process that ran {name} {reason}") from None
    finally:
        process.join(timeout=5)
        process.kill()


def answer_elsewhere(connection: Connection, name: str | Path, request: Request, generation: Generation, loading: dict) -> None:
    """The other process: loads the model and sends what it says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The first process hears Ctrl-C too, and ends this one.
    try:
        for told in spoken(name, request, generation, **loading):
            connection.send(told)
    except VlquantError as error:
        connection.send(error)


def spoken(name: str | Path, request: Request, generation: Generation, *, device: str, **loading) -> Iterator[Told]:
    """What a model says piece by piece, with speed and memory at the end."""
    from vlquant.runtime.pipeline import load

    pipeline = load(name, device, vision=default_vision(name), **loading)
    told = Told(pipeline.model.folder.name)
    stream = pipeline.stream(request, generation=generation)
    for piece in stream:
        told = replace(told, text=told.text + piece)
        yield told
    usage = stream.answer.usage
    rest, seconds = usage.answer_tokens - 1, usage.answer_seconds
    yield replace(
        told,
        text=stream.answer.text,
        tokens=usage.answer_tokens,
        first_token_seconds=usage.vision_seconds + usage.prompt_seconds,
        tokens_per_second=rest / seconds if rest and seconds else None,
        peak_bytes=peak_memory(),
        done=True,
    )


def side_by_side(told: Sequence[Told]) -> Columns:
    """Both answers in panels, words that differ marked once both are whole."""
    whole = all(each.done for each in told)
    texts = marked(told[0].text, told[1].text) if whole else [Text(each.text) for each in told]
    panels = [
        Panel(Group(text, Text(facts(each), style="dim")), title=Text(each.name), title_align="left")
        for each, text in zip(told, texts, strict=True)
    ]
    return Columns(panels, equal=True, expand=True)


def facts(told: Told) -> str:
    """What an answer took, in a line."""
    if not told.done:
        return "..." if told.text else "loading"
    parts = [f"{told.tokens} tokens", f"first after {told.first_token_seconds:.2f} s"]
    parts += [f"then {told.tokens_per_second:.1f} tokens/s"] if told.tokens_per_second else []
    parts += [f"peak memory {told.peak_bytes / 1e9:.2f} GB"] if told.peak_bytes else []
    return ", ".join(parts)


def marked(first: str, second: str) -> list[Text]:
    """Both texts, words that the other does not have in that place drawn otherwise."""
    words = [split_words(text) for text in (first, second)]
    texts = [Text(), Text()]
    for kind, *places in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (start, stop) in enumerate((places[:2], places[2:])):
            texts[side].append("".join(words[side][start:stop]), style="" if kind == "equal" else f"{CHANGED} underline")
    return texts


def split_words(text: str) -> list[str]:
    """Words with the space behind them; characters of scripts without spaces stand for themselves."""
    words: list[str] = []
    for character in text:
        if words and not words[-1][-1:].isspace() and (character.isspace() or (character.isascii() and words[-1].isascii())):
            words[-1] += character
        else:
            words.append(character)
    return words
