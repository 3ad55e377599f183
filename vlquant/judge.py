"""Ask a reference and quantized models the same questions and score both. Knows no files and no verdict."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlquant.calib_data.samples import Sample, sample_request
from vlquant.errors import InvalidRequest
from vlquant.metrics import score
from vlquant.request import EncodedRequest
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import Pipeline

ROWS = 48
"""Questions answered side by side."""
GENERATION = Generation(max_new_tokens=40)
"""Greedy; the longest right answer of the built-in set has 30 tokens."""


@dataclass(frozen=True)
class Asked:
    """A question of a set, ready for the models."""

    picture: str
    """Key of the scene; questions about one scene share it."""
    kind: str
    text: str
    answer: str
    """The right answer."""
    encoded: EncodedRequest


@dataclass(frozen=True)
class Judged:
    """One question, both answers, and how far their distributions are apart."""

    picture: str
    kind: str
    question: str
    answer: str
    reference: str
    quantized: str
    reference_score: float
    quantized_score: float
    divergence: float
    """Mean KL(reference || quantized) in nats over the tokens of the reference's answer."""
    same_top: int
    """Tokens of the reference's answer at which both find the same token likeliest."""
    tokens: int
    """Tokens of the reference's answer, stop token included."""


def judge(
    reference: Pipeline,
    candidates: Mapping[str, Pipeline],
    samples: Iterable[Sample],
    *,
    step: Callable[[int], None] = lambda questions: None,
) -> dict[str, list[Judged]]:
    """Greedy answers of every candidate beside the reference's, question by question, by candidate name.

    The distributions are compared along the reference's own answer (teacher forcing). `step` hears how many
    questions are done. Raises InvalidRequest if a candidate makes another prompt of a question.
    """
    judged: dict[str, list[Judged]] = {name: [] for name in candidates}
    for asked in question_groups(reference, samples):
        encoded = [each.encoded for each in asked]
        visual = reference.features(encoded)
        answers = reference.batch(encoded, GENERATION, features=visual)
        ids = [answer.ids for answer in answers]
        wanted = reference.answer_logits(encoded, ids, features=visual)
        for name, candidate in candidates.items():
            require_same_prompts(candidate, asked)
            texts, logits = answer_alike(candidate, encoded, ids)
            for each, answer, text, first, second in zip(asked, answers, texts, wanted, logits, strict=True):
                judged[name].append(compare_answers(each, answer.text, text, first, second))
        step(len(asked))
    return judged


def answer_alike(
    candidate: Pipeline, encoded: Sequence[EncodedRequest], forced: Sequence[Sequence[int]]
) -> tuple[list[str], list[Tensor]]:
    """A candidate's own greedy answers, and its logits along the forced ones."""
    visual = candidate.features(encoded)
    texts = [answer.text for answer in candidate.batch(encoded, GENERATION, features=visual)]
    return texts, candidate.answer_logits(encoded, forced, features=visual)


def question_groups(pipeline: Pipeline, samples: Iterable[Sample]) -> Iterator[list[Asked]]:
    """Questions encoded and grouped by ROWS; those about one scene stay together, so that it is seen once."""
    group: list[Asked] = []
    for sample in samples:
        for question in sample.questions:
            encoded = pipeline.encode(sample_request(sample, question))
            group.append(Asked(sample.key, sample.kind, question.text, question.answer, encoded))
        if len(group) >= ROWS:
            yield group
            group = []
    if group:
        yield group


def require_same_prompts(candidate: Pipeline, asked: Sequence[Asked]) -> None:
    """Raise InvalidRequest if `candidate` would read other token ids than the reference."""
    for each in asked:
        if candidate.tokenizer.encode(each.encoded.prompt) != list(each.encoded.ids):
            raise InvalidRequest(
                f"the bundle's tokenizer gives other token ids than the reference's for {each.text!r}; quantize the model again"
            )


def compare_answers(asked: Asked, reference: str, quantized: str, wanted: Tensor, given: Tensor) -> Judged:
    """Score both answers; `wanted` and `given` are logits [tokens, vocab] along the reference's answer."""
    wanted, given = torch.log_softmax(wanted.double(), -1), torch.log_softmax(given.double(), -1)
    divergence = (wanted.exp() * (wanted - given)).sum(-1).mean()
    return Judged(
        picture=asked.picture,
        kind=asked.kind,
        question=asked.text,
        answer=asked.answer,
        reference=reference,
        quantized=quantized,
        reference_score=score(asked.kind, asked.answer, reference),
        quantized_score=score(asked.kind, asked.answer, quantized),
        divergence=divergence.item(),
        same_top=int((wanted.argmax(-1) == given.argmax(-1)).sum()),
        tokens=len(wanted),
    )
