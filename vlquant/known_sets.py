"""What is known of published sets by their names: how InternVL is asked, how answers are scored. Data, and finding it."""

import re
from dataclasses import dataclass

QUESTION = "{question}"
IN_A_WORD = "Answer the question using a single word or phrase."
REGION = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{question}</ref>"


@dataclass(frozen=True)
class KnownSet:
    """What is done with a set."""

    metric: str | None
    """How an answer is scored, by a name of metrics.METRICS; None: by none of ours."""
    prompt: str = QUESTION
    """How VLMEvalKit, or for boxes InternVL itself, asks a question without options."""
    own_scores: str | None = None
    """Its scores of the whole set, by a name of set_scores.SET_SCORES, if it has some of its own."""
    kinds: str = "category"
    """Column of a question's kind."""


SHORT_ANSWER = f"{QUESTION}\n{IN_A_WORD}"
CHOICE = KnownSet("choice")
CIRCULAR = KnownSet("choice", own_scores="circular")
KNOWN_SETS = {
    "OCRVQA": KnownSet("exact", SHORT_ANSWER),
    "GQA": KnownSet("exact", SHORT_ANSWER),
    "TextVQA": KnownSet("vqa", SHORT_ANSWER),
    "VizWiz": KnownSet("vqa", SHORT_ANSWER),
    "ChartQA": KnownSet("relaxed", SHORT_ANSWER),
    "DocVQA": KnownSet("anls", SHORT_ANSWER),
    "InfoVQA": KnownSet("anls", SHORT_ANSWER),
    "OCRBench": KnownSet("contains", SHORT_ANSWER),
    "OCRBench_v2": KnownSet(None, SHORT_ANSWER),
    "DUDE": KnownSet(None, SHORT_ANSWER),
    "SLIDEVQA": KnownSet(None, SHORT_ANSWER),
    "MMLongBench_DOC": KnownSet(None, SHORT_ANSWER),
    "MME": KnownSet("yes_no", f"{QUESTION} {IN_A_WORD}", own_scores="mme"),
    "MME-RealWorld": CHOICE,
    "Video-MME": CHOICE,
    "HallusionBench": KnownSet(
        "yes_no", f"{QUESTION} Please answer yes or no. {IN_A_WORD}", own_scores="hallusion", kinds="l2-category"
    ),
    "AMBER": KnownSet("yes_no", f"{QUESTION} Please answer yes or no. {IN_A_WORD}"),
    "POPE": KnownSet("yes_no"),  # Its questions say themselves how to answer.
    "AI2D": CHOICE,
    "MMMU": CHOICE,
    "MMStar": CHOICE,
    "SEED": CHOICE,
    "SEEDBench": CHOICE,
    "ScienceQA": CHOICE,
    "RealWorldQA": CHOICE,
    "MMBench": CIRCULAR,
    "CCBench": CIRCULAR,
    "RefCOCO": KnownSet("box", REGION),
    "RefCOCOg": KnownSet("box", REGION),
}
UNKNOWN = KnownSet(None)


def known_set(name: str) -> KnownSet:
    """What is known of a set by the longest of these names that its own contains, as a word and whatever its case."""
    found = [part for part in KNOWN_SETS if re.search(rf"(?<![a-z]){re.escape(part)}(?![a-z])", name, re.IGNORECASE)]
    return KNOWN_SETS[max(found, key=len)] if found else UNKNOWN
