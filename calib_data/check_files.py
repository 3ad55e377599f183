"""Check sets in files: VLMEvalKit's TSV and InternVL's fine-tuning JSONL. Knows no model.

Which rows show the same picture is known when a file is opened; the pictures themselves are read group by group.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from vlquant.answer_forms import read_yes_no, written_options
from vlquant.calib_data.check_questions import CheckQuestion
from vlquant.calib_data.conversations import named
from vlquant.calib_data.finetuning import FinetuningSet
from vlquant.calib_data.picture_groups import Shown, by_contents, groups_of, taken
from vlquant.calib_data.tsv import TsvFile, listed, options_of, prompt_of
from vlquant.errors import InvalidRequest
from vlquant.known_sets import known_set
from vlquant.metrics import METRICS, Gold, read_box
from vlquant.request import Picture, Request, is_file, open_image
from vlquant.shards import file_hash

FORMULAS = "Handwritten Mathematical Expression Recognition"
"""Category of OCRBench whose answers are formulas."""
OTHER_ANSWERS = "Other Answers"
"""The second option that VLMEvalKit gives a question of a choice set that has none; the first is the right answer."""
LARGEST_SIDE = 1000
PLACEHOLDER = re.compile(r"(Image-\d+: )?<image>\n?")


class QuestionFile(Protocol):
    """The questions of a file, by position."""

    path: Path
    parts: Sequence[Path]
    """The files that hold the questions."""

    def __len__(self) -> int: ...

    def shown(self, position: int) -> Shown:
        """What a question's pictures are known by."""

    def pictures(self, position: int) -> Sequence[Picture]:
        """A question's pictures."""

    def question(self, position: int) -> CheckQuestion:
        """A question whose pictures are not opened."""


class FileQuestions:
    """A check set of a file's questions, or of some of its pictures."""

    def __init__(self, file: QuestionFile, *, limit: int | None, seed: int):
        self.name = file.path.stem
        self._file = file
        named_by = [file.shown(position) for position in range(len(file))]
        shown = by_contents(named_by)
        self._groups = taken(groups_of(shown), limit, seed=seed)
        self._shown = {position: shown[position] for group in self._groups for position in group}
        """In their order."""
        self._files: dict[Path, None] = {}
        """Of its pictures and videos, in their order."""
        questions = [file.question(position) for position in self._shown]
        for position, question in zip(self._shown, questions, strict=True):
            files = [each for each in named_by[position] if isinstance(each, Path)]
            require_files(files, question.key)
            self._files.update(dict.fromkeys(files))
        require_scorable(questions, file.path)

    def __len__(self) -> int:
        return len(self._shown)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file; with those of the pictures it asks about if they are files of their own."""
        hashes = [file_hash(path) for path in (*self._file.parts, *self._files)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def groups(self) -> Iterator[list[CheckQuestion]]:
        """All questions, in the order of the file, those of the same `picture` together."""
        for positions in self._groups:
            yield self._opened(positions)

    def _opened(self, positions: Sequence[int]) -> list[CheckQuestion]:
        """The questions of a group, each different picture opened once."""
        opened: dict[Shown, tuple] = {}
        questions = [self._file.question(position) for position in positions]
        for position, question in zip(positions, questions, strict=True):
            if self._shown[position] not in opened:
                with named(question.key):
                    opened[self._shown[position]] = tuple(map(open_image, self._file.pictures(position)))
        return [
            replace(question, picture=questions[0].key, request=replace(question.request, images=opened[self._shown[position]]))
            for position, question in zip(positions, questions, strict=True)
        ]


class TsvQuestions:
    """The questions of a VLMEvalKit TSV file."""

    def __init__(self, path: Path, metric: str | None):
        self.path, self.parts = path, [path]
        self._metric = metric
        self._known = known_set(path.stem)
        self._rows = TsvFile(path)
        lines: dict[str, int] = {}
        for position, row in enumerate(self._rows.rows):
            earlier = lines.setdefault(self._index(position), row.line)
            if earlier != row.line:
                raise InvalidRequest(
                    f"{path}, line {row.line}: its index {self._index(position)!r} is that of line {earlier} as well; "
                    "give every row an index of its own"
                )

    def __len__(self) -> int:
        return len(self._rows)

    def shown(self, position: int) -> Shown:
        """What a question's pictures are known by."""
        row = self._rows.rows[position]
        with named(f"{self.path}, line {row.line}"):
            return self._rows.shown(row)

    def pictures(self, position: int) -> Sequence[Picture]:
        """A question's pictures, read anew."""
        return self._rows.pictures(self._rows.rows[position])

    def question(self, position: int) -> CheckQuestion:
        """A question whose pictures are not opened."""
        row = self._rows.rows[position]
        metric, gold = self._judged(row.cells)
        key = f"{self.path.name}, line {row.line}"
        return CheckQuestion(
            key, picture=key, kind=row.cells.get(self._known.kinds, self.path.stem), index=self._index(position),
            text=row.cells["question"], request=Request(prompt_of(row.cells, self.path.stem)), gold=gold, metric=metric,
            cells={"index": self._index(position), **row.cells},
        )  # fmt: skip

    def _index(self, position: int) -> str:
        """A row's index, or, without that column, its place as pandas counts it."""
        return self._rows.rows[position].cells.get("index", str(position))

    def _judged(self, cells: dict[str, str]) -> tuple[str, Gold | None]:
        """How the answer to a row is scored, and what is right; ("", None) if nobody knows."""
        answer = cells.get("answers", cells.get("answer"))
        if answer is None:
            return "", None
        answers, options = tuple(listed(answer)), options_of(cells)
        metric = self._metric or ("choice" if options else self._known.metric)
        if metric is None:
            raise InvalidRequest(
                f"{self.path}: how answers to a set of this name are scored is not known; say it with --metric, "
                f"one of {', '.join(METRICS)}"
            )
        if metric == "contains" and cells.get("category") == FORMULAS:
            metric = "contains_formula"
        if metric == "choice" and not options:
            return metric, Gold(("A",), (("A", answers[0]), ("B", OTHER_ANSWERS)))
        return metric, Gold(answers, options)


class FinetuningQuestions:
    """The last questions of the conversations in InternVL's fine-tuning format."""

    def __init__(self, path: Path, metric: str | None):
        self.path = path
        self._metric = metric
        self._conversations = FinetuningSet(path)
        self.parts = list(dict.fromkeys(line.path for line in self._conversations.lines))

    def __len__(self) -> int:
        return len(self._conversations)

    def shown(self, position: int) -> Shown:
        """What a question's pictures are known by."""
        request = self._conversations[position].request
        pictures = [*request.images, *filter(None, [request.video])]
        return tuple(each if isinstance(each, Path) else hashlib.sha256(each.encode()).hexdigest() for each in pictures)

    def pictures(self, position: int) -> Sequence[Picture]:
        """A question's pictures, read anew."""
        return self._conversations[position].request.images

    def question(self, position: int) -> CheckQuestion:
        """A question whose pictures are not opened."""
        line, conversation = self._conversations.lines[position], self._conversations[position]
        key = f"{os.path.relpath(line.path, self.path.parent)}, line {line.number}"
        text = PLACEHOLDER.sub("", conversation.request.question).strip()
        cells = {"index": key, "question": text, "category": line.path.stem}
        judged = ("", None)
        if conversation.answer is not None:
            cells["answer"] = conversation.answer
            gold = Gold((conversation.answer,), written_options(text))
            judged = (self._metric or metric_of(gold), gold)
        return CheckQuestion(
            key, picture=key, kind=line.path.stem, index=key, text=text, request=conversation.request,
            metric=judged[0], gold=judged[1], cells=cells,
        )  # fmt: skip


READERS = {".tsv": TsvQuestions, ".jsonl": FinetuningQuestions, ".json": FinetuningQuestions}


def metric_of(gold: Gold) -> str:
    """How an answer is scored whose set has no name: by what it is, an option, a box, yes or no, or any text."""
    answer = gold.answers[0]
    if gold.options:
        return "choice"
    if read_box(answer) is not None:
        return "box"
    return "yes_no" if read_yes_no(answer) and len(answer.split()) == 1 else "exact"


def require_scorable(questions: Sequence[CheckQuestion], path: Path) -> None:
    """Raise InvalidRequest if answers are known and none of them is right by its own metric, or a box is in pixels."""
    known = [question for question in questions if question.gold is not None]
    for question in known:
        box = read_box(question.gold.answers[0]) if question.metric == "box" else None
        if box is not None and max(box) > LARGEST_SIDE:
            raise InvalidRequest(
                f"{question.key}: its answer is the box {question.gold.answers[0][:80]}, in which {max(box):g} is beyond the "
                "picture; write boxes in thousandths of the picture, as InternVL does"
            )
    if known and not any(right_score(question) for question in known):
        first = known[0]
        raise InvalidRequest(
            f"{path}: by the metric {first.metric} not one of its own answers is right, {first.gold.answers[0][:80]!r} "
            f"({first.key}) for example; choose another --metric, one of {', '.join(METRICS)}"
        )


def right_score(question: CheckQuestion) -> float:
    """What the right answer itself scores."""
    return max(METRICS[question.metric](answer, question.gold).value for answer in question.gold.answers)


def require_files(files: Sequence[Path], key: str) -> None:
    """Raise InvalidRequest now rather than after an hour if a picture or video is not there."""
    for file in files:
        if not is_file(file):
            raise InvalidRequest(f"{key}: {file} does not exist; put the picture or video there")
