"""Questions with known answers to check a model on: the built-in set and files, by name. Knows no model.

What a set consists of is known when it is opened; pictures are read, or drawn, when its questions are asked for.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from vlquant.calib_data.check_files import READERS, FileQuestions
from vlquant.calib_data.check_questions import CheckQuestion, CheckSet
from vlquant.calib_data.samples import Sample, draw_sample, sample_request, samples, set_hash
from vlquant.errors import InvalidRequest
from vlquant.metrics import METRICS, Gold, builtin_metric
from vlquant.request import is_file

SCENES = 800
"""Scenes of a built-in set if no limit is given, about 2,800 questions."""
BUILTIN = {"builtin": "check", "builtin-development": "development"}
"""Split of the built-in sets by their names."""
KNOWN_SETS = "use builtin, builtin-development, a .tsv file (VLMEvalKit) or a .jsonl or .json file (InternVL fine-tuning)"


def open_check_set(name: str, *, limit: int | None = None, seed: int = 0, metric: str | None = None) -> CheckSet:
    """The check set of a name or file.

    limit: pictures are taken until they have so many questions, and the last brings all of its own: the first scenes of
    a built-in set, pictures that the seed decides of a file. metric: instead of the one known by the file's name or columns.
    Raises InvalidRequest if there is no such set, or it cannot be read or scored.
    """
    if limit is not None and limit < 1:
        raise InvalidRequest(f"--limit {limit} leaves nothing to ask; give --limit 1 or more")
    if metric is not None and metric not in METRICS:
        raise InvalidRequest(f"--metric {metric}: there is no such metric; use {', '.join(METRICS)}")
    if name in BUILTIN:
        if metric is not None:
            raise InvalidRequest(f"--metric {metric}: {name} has a metric for each of its kinds; leave --metric out")
        return BuiltinQuestions(name, limit=limit, seed=seed)
    path = Path(name)
    if not is_file(path):
        reason = "this is a folder, which holds no questions" if os.path.isdir(path) else "there is no such set or file"
        raise InvalidRequest(f"{name}: {reason}; {KNOWN_SETS}")
    if path.suffix.lower() not in READERS:
        raise InvalidRequest(f"{name}: this kind of file is not known; {KNOWN_SETS}")
    return FileQuestions(READERS[path.suffix.lower()](path, metric), limit=limit, seed=seed)


class BuiltinQuestions:
    """The first scenes of a built-in split, each with all its questions."""

    def __init__(self, name: str, *, limit: int | None, seed: int):
        self.name = name
        self.split, self.seed = BUILTIN[name], seed
        self.scenes, self._questions = 0, 0
        while self.scenes < SCENES if limit is None else self._questions < limit:
            self._questions += len(draw_sample(self.split, self.scenes, seed=seed).questions)
            self.scenes += 1

    def __len__(self) -> int:
        return self._questions

    @cached_property
    def sha256(self) -> str:
        """Hash of the pixels, questions and answers."""
        return set_hash(self.split, self.scenes, seed=self.seed)

    def groups(self) -> Iterator[list[CheckQuestion]]:
        """All questions, scene by scene."""
        return map(scene_questions, samples(self.split, self.scenes, seed=self.seed))


def scene_questions(sample: Sample) -> list[CheckQuestion]:
    """What is asked about one scene of a built-in set."""
    asked = []
    for number, question in enumerate(sample.questions, 1):
        index = f"{sample.key}/{number}"
        asked.append(CheckQuestion(
            f"builtin {sample.key}, question {number}", picture=sample.key, kind=sample.kind, index=index, text=question.text,
            request=sample_request(sample, question), gold=Gold((question.answer,)), metric=builtin_metric(sample.kind),
            cells={"index": index, "question": question.text, "answer": question.answer, "category": sample.kind},
        ))  # fmt: skip
    return asked
