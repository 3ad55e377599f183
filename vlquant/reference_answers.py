"""Answers to calibrate on where the data has none: the float model writes them itself, greedily, once."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from vlquant.calib_data.conversations import Conversation, named
from vlquant.calibration_sets import ChosenConversations, WrittenAnswer
from vlquant.errors import VlquantError
from vlquant.events import Event, Report
from vlquant.fitting import LONGEST_ANSWER, fitting_request
from vlquant.machine import available_memory
from vlquant.model import Model
from vlquant.publishing import replace_text
from vlquant.request import EncodedRequest
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import Pipeline, load

TOGETHER = 8
"""Conversations answered side by side."""


def with_answers(
    chosen: ChosenConversations, model: Model, kept: Path, *, most_tokens: int, device: str, report: Report
) -> ChosenConversations:
    """The conversations with an answer for each, written by the unquantized `model` where there is none.

    kept: file of the answers, from which an interrupted run goes on. Raises VlquantError if the model does not fit into
    memory.
    """
    if not chosen.unanswered:
        return chosen
    answers = [WrittenAnswer(*each) for each in json.loads(kept.read_text(encoding="utf-8"))] if kept.exists() else []
    if len(answers) < len(chosen.unanswered):
        require_memory(model, available_memory())
        if torch.device(device).type == "cuda":
            require_memory(model, torch.cuda.mem_get_info(device)[0], f"memory of {device}")
        report(Event("answers", message=f"{len(chosen.unanswered)} conversations have no answer: {model.folder.name} writes them"))
    try:
        for more in written_answers(chosen, model, len(answers), most_tokens=most_tokens, device=device):
            answers += more
            replace_text(kept, json.dumps([(each.text, each.cut) for each in answers]))
            report(Event("answers", len(answers), len(chosen.unanswered)))
    except torch.OutOfMemoryError:
        raise VlquantError(
            f"{device} has too little free memory for {model.folder.name} to write the answers that the calibration data "
            "lacks; use --device cpu or fewer --tokens, or give a .jsonl file with answers"
        ) from None
    return replace(chosen, answers=dict(zip(chosen.unanswered, answers, strict=True)))


def written_answers(
    chosen: ChosenConversations, model: Model, done: int, *, most_tokens: int, device: str
) -> Iterator[list[WrittenAnswer]]:
    """The answers still missing after the first `done`, a batch at a time."""
    if done < len(chosen.unanswered):
        reference = load(model.folder, device, vision="torch")
    # Always the same neighbours, so that an interrupted run gets the same answers.
    for start in range(done, len(chosen.unanswered), TOGETHER):
        together = [chosen[index] for index in chosen.unanswered[start : start + TOGETHER]]
        asked = [encode_unanswered(reference, each, most_tokens=most_tokens) for each in together]
        answers = reference.batch(asked, Generation(max_new_tokens=LONGEST_ANSWER))
        yield [WrittenAnswer(answer.text, cut=answer.usage.ended_by != "stop") for answer in answers]


def encode_unanswered(reference: Pipeline, conversation: Conversation, *, most_tokens: int) -> EncodedRequest:
    """A question as it will be calibrated on; raises InvalidRequest naming it if it does not fit the model's context."""
    with named(conversation.key):
        return reference.encode(fitting_request(conversation, reference.config, reference.tokenizer, most_tokens=most_tokens))


def require_memory(model: Model, available: int | None, kind: str = "memory") -> None:
    """Raise VlquantError if the float model, whose weights are kept as they are stored, is clearly larger than memory."""
    needed = sum(path.stat().st_size for path in model.folder.glob("model*.safetensors"))
    if available is not None and needed > available:
        raise VlquantError(
            f"the calibration data has conversations without answers, and {model.folder.name}, which would write them, needs "
            f"{needed / 1e9:.1f} GB where {available / 1e9:.1f} GB of {kind} are free; give a .jsonl file with answers"
        )
