"""What a free answer says: the normal forms and readings of VLMEvalKit, for scores to compare. Knows no scores.

Oddities of the original are kept where they decide a score, and named.
"""

import math
import re
import string
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_DROPPED = 32
"""The original passes re.UNICODE, which is 32, where the number of replacements belongs."""
NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
"""Words that are recognized although one of their apostrophes is missing."""
COMPLETED = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTIONS for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # The original has this one the wrong way round.
AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 4
"""Only in so many words at the end of an answer is a capital letter an option, and not, say, an article."""
NO_OPTION = "Z"
"""The letter by which judges say that an answer chooses nothing."""


def without_punctuation(text: str) -> str:
    """The text with marks taken out, or replaced by spaces, as the VQA challenge does; numbers keep their point."""
    original, keeps_words_apart = text, COMMA_IN_NUMBER.search(text) is None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, " " if keeps_words_apart and not beside_space else "")
    return PERIOD.sub("", text, count=PERIODS_DROPPED)


def vqa_form(text: str) -> str:
    """An answer as the VQA challenge compares it: no marks, no articles, digits for number words, whole contractions."""
    words = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [NUMBER_WORDS.get(word, word) for word in words]
    return " ".join(COMPLETED.get(word, word) for word in words if word not in ARTICLES)


def single_spaced(text: str) -> str:
    """Lower case, with one space between words."""
    return " ".join(text.lower().split())


def read_number(text: str) -> float | None:
    """A finite number, of which a percent sign makes hundredths; None for all else."""
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_yes_no(text: str) -> str | None:
    """"yes" or "no" if exactly one of them is among the words."""
    said = {"yes", "no"} & set(without_punctuation(text.lower()).split())
    return said.pop() if len(said) == 1 else None


def read_choice(text: str, options: Sequence[tuple[str, str]]) -> str | None:
    """The letter that an answer chooses among `options` (letter, text): the only letter in it, else the only text.

    None if it chooses none, or several. Texts count in answers of at most twice their length together.
    """
    words = text.translate(AROUND_LETTERS).split()
    letters = [letter for letter, _ in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - LAST_WORDS:
        return letters[0]
    if not letters and NO_OPTION in words:
        return None
    text = text.lower()
    if len(text) > 2 * sum(len(option) for _, option in options):
        return None
    named = [letter for letter, option in options if option.lower() in text]
    return named[0] if len(named) == 1 else None


def written_options(text: str) -> tuple[tuple[str, str], ...]:
    """The options (letter, text) that a question lists itself, a line for each from A on; () if it lists fewer than two."""
    lines = [re.match(r"\s*\(?([A-Z])[.):：、]\s*(\S.*)", line) for line in text.splitlines()]
    found = [(line[1], line[2].strip()) for line in lines if line]
    in_order = [letter for letter, _ in found] == list(string.ascii_uppercase[: len(found)])
    return tuple(found) if len(found) > 1 and in_order else ()


def edit_distance(first: str, second: str) -> int:
    """How few characters must be put in, taken out or replaced to make one text of the other."""
    distances = list(range(len(first) + 1))
    for row, wanted in enumerate(second, 1):
        diagonal, distances[0] = distances[0], row
        for column, character in enumerate(first, 1):
            replaced = diagonal + (character != wanted)
            diagonal = distances[column]
            distances[column] = min(replaced, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]
