"""Conversations without pictures, in English and Chinese: topics from texts/, with their slots filled at random."""

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from vlquant.calib_data.sums import SUMS

LANGUAGES = ("en", "zh")
MOST_TURNS = 3

Turn = tuple[str, str]
"""What is asked, and the answer."""


@dataclass(frozen=True)
class Topic:
    """One or two turns with <slots>, and what may stand in these."""

    turns: tuple[Turn, ...]
    choices: tuple[tuple[dict[str, str], ...], ...]
    """Of every item one is chosen; it fills one slot, or several that belong together."""
    sums: str | None = None
    """The calculation that fills the others."""


def dialogue(language: str, number: int, *, seed: int = 0) -> list[Turn]:
    """Conversation `number` in a language: two topics, of two or three turns together, none repeated before all have been used."""
    topics = load_topics(language)
    per_round = len(topics) // 2
    order = random.Random(f"{language}/{seed}/{number // per_round}").sample(range(len(topics)), len(topics))
    first = 2 * (number % per_round)
    chance = random.Random(f"{language}/{seed}/{number}")
    return [turn for index in order[first : first + 2] for turn in filled(topics[index], chance)][:MOST_TURNS]


def filled(topic: Topic, chance: random.Random) -> list[Turn]:
    """A topic's turns with its slots filled."""
    slots = {name: text for choices in topic.choices for name, text in chance.choice(choices).items()}
    if topic.sums:
        slots.update({name: str(value) for name, value in SUMS[topic.sums](chance).items()})
    return [tuple(re.sub(r"<(\w+)>", lambda found: slots[found[1]], text) for text in turn) for turn in topic.turns]


@lru_cache
def load_topics(language: str) -> tuple[Topic, ...]:
    """All topics of a language: blocks of lines, first the slots (`a, b: A1; B1 | A2; B2`), then turns (`Q: ...`, `A: ...`)."""
    text = (files("vlquant.calib_data") / "texts" / f"dialogue_{language}.txt").read_text(encoding="utf-8")
    return tuple(read_topic(block) for block in text.strip().split("\n\n"))


def read_topic(block: str) -> Topic:
    """One block; an answer may have several lines."""
    head, *turns = re.split(r"^Q: ", block, flags=re.MULTILINE)
    pairs = tuple(tuple(turn.strip().split("\nA: ")) for turn in turns)
    choices, sums = [], None
    for line in head.splitlines():
        names, _, values = line.partition(": ")
        if names == "sums":
            sums = values
        else:
            choices.append(tuple(dict(zip(names.split(", "), each.split("; "), strict=True)) for each in values.split(" | ")))
    return Topic(pairs, tuple(choices), sums)
