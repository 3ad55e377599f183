"""Train the demo model: `python -m vlquant.calib_data.train OUTPUT --minutes 120`.

Three phases: the vision tower alone learns to name what is drawn under each visual token, the
language model alone learns to read them, then everything learns everything. Killed and started
again, it continues from its last checkpoint.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
import typer
from torch import Tensor

from vlquant.calib_data.batches import CELL_CLASSES, IGNORE, Batch, Row, collate, encode_sample
from vlquant.calib_data.demo_config import demo_config
from vlquant.calib_data.publish import publish
from vlquant.calib_data.samples import KINDS, draw_sample
from vlquant.calib_data.student import Student, create_student, load_checkpoint, load_published, save_checkpoint
from vlquant.calib_data.vocabulary import write_json, write_tokenizer
from vlquant.config import read_config
from vlquant.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Phase:
    """A part of the training time."""

    name: str
    until: float
    """End, as a part of the whole time."""
    kinds: tuple[str, ...]


WEAK_AND_ALL = (*KINDS, *("chart", "count", "choice", "locate", "chart") * 2, "receipt")
"""What is slow to learn comes more often."""
PHASES = (
    Phase("see", 0.1, WEAK_AND_ALL),
    # In the full mixture reading stays undiscovered for very long; alone it takes some hundred steps.
    Phase("read", 0.4, ("page", "page", "text_only", "page", "several", "text")),
    Phase("answer", 1.0, WEAK_AND_ALL),
)
CONTINUED_PHASES = (Phase("see", 0.07, WEAK_AND_ALL), Phase("answer", 1.0, WEAK_AND_ALL))
"""From a trained model: its cell head is new, everything else has been learned before."""
DECAY_SHARE = 0.4
"""Part of the time, at the end, in which the learning rate falls to zero."""
CELL_LOSS_WEIGHT = 0.05
EMPTY_CELL_WEIGHT = 0.3
"""Of cells without a name, beside those with one."""
ROWS = 16
"""Scenes of a process's batch."""
POOL = 8
"""Batches drawn at once and sorted by length, so that little is padding."""
SAVE_SECONDS = 300


@dataclass(frozen=True)
class Plan:
    """The command's options."""

    output: Path
    minutes: float
    seed: int
    processes: int
    rate: float
    start: Path | None


@dataclass(frozen=True)
class Progress:
    """What a checkpoint carries besides tensors."""

    step: int = 0
    seconds: float = 0.0


def train(
    output: Annotated[Path, typer.Argument(help="Folder for the model; its checkpoint lies in OUTPUT/training.")],
    minutes: Annotated[float, typer.Option(help="Training time, earlier runs counted in.")] = 120,
    seed: Annotated[int, typer.Option(help="Seed of weights and pictures.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes of one thread each; each takes ROWS scenes a step.")] = 2,
    rate: Annotated[float, typer.Option(help="Peak learning rate of the matrices.")] = 0.0015,
    start: Annotated[Path | None, typer.Option(help="Published model to start from: all kinds from the first step.")] = None,
) -> None:
    """Train the demo model, or continue, until MINUTES are used up; then write it in the published layout."""
    (output / "training").mkdir(parents=True, exist_ok=True)
    (output / "training" / "processes").unlink(missing_ok=True)
    if start is not None:
        copy_settings(start, output)
    elif not (output / "config.json").exists():
        write_json(output / "config.json", demo_config(write_tokenizer(output)))
    plan = Plan(output, minutes, seed, processes, rate, start)
    # One-thread processes with averaged gradients use small matrices' cores far better than threads do.
    torch.multiprocessing.spawn(work, (plan,), nprocs=processes)


def work(rank: int, plan: Plan) -> None:
    """One process of training: its own scenes, everybody's gradients."""
    torch.set_num_threads(1)
    meeting_point = f"file://{(plan.output / 'training' / 'processes').absolute()}"
    torch.distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=plan.processes)
    config, tokenizer = read_config(plan.output), load_tokenizer(plan.output)
    student = create_student(config, plan.seed, tokenizer.token_id(config.chat.image_token))
    if plan.start is not None:
        load_published(student, plan.start)
    progress = Progress(**load_checkpoint(student, plan.output / "training"))
    saved, started = time.monotonic(), time.monotonic() - progress.seconds
    while progress.seconds < plan.minutes * 60:
        part = progress.seconds / (plan.minutes * 60)
        phase = next(each for each in (CONTINUED_PHASES if plan.start else PHASES) if part < each.until)
        student.set_rate(plan.rate * schedule(part))
        first = (progress.step * plan.processes + rank * POOL) * ROWS
        rows = [
            encode_sample(draw_sample("train", index, seed=plan.seed, kinds=phase.kinds), config, tokenizer)
            for index in range(first, first + POOL * ROWS)
        ]
        batches = sort_into_batches(rows, progress.step, tokenizer.pad_id)
        measured = [take_step(student, batch, phase.name) for batch in batches]
        progress = Progress(progress.step + POOL, shared_seconds(time.monotonic() - started))
        if rank == 0:
            minutes = round(progress.seconds / 60, 2)
            print(json.dumps({"step": progress.step, "minutes": minutes, **means(measured)}), flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                save_checkpoint(student, plan.output / "training", progress.__dict__)
                saved = time.monotonic()
    if rank == 0:
        save_checkpoint(student, plan.output / "training", progress.__dict__)
        publish(student.weights, config, plan.output)
    torch.distributed.destroy_process_group()


def copy_settings(start: Path, output: Path) -> None:
    """Take config.json and the tokenizer over from the model to start from."""
    for path in start.iterdir():
        if path.name == "tokenizer.model" or path.suffix == ".json":
            shutil.copyfile(path, output / path.name)


def shared_seconds(seconds: float) -> float:
    """The first process's clock, so that all stop and slow down together."""
    clock = torch.tensor([seconds], dtype=torch.float64)
    torch.distributed.broadcast(clock, src=0)
    return clock.item()


def sort_into_batches(rows: list[Row], step: int, pad_id: int) -> list[Batch]:
    """Batches of ROWS scenes of like length, so that little is padding, in an order drawn from `step`."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    batches = [collate(rows[start : start + ROWS], pad_id) for start in range(0, len(rows), ROWS)]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(step))
    return [batches[index] for index in order]


def schedule(part: float) -> float:
    """Learning-rate factor after `part` of the time: short warm-up, plateau, linear decay."""
    return min(1.0, part / 0.01 + 0.02, max(0.0, (1 - part) / DECAY_SHARE))


def take_step(student: Student, batch: Batch, phase: str) -> dict[str, float]:
    """One optimizer step; returns the losses and, by kind, the share of questions answered right to the letter."""
    measured, loss = {}, torch.zeros(())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(phase != "read"):
        features = student.features(batch.pixel_values) if len(batch.pixel_values) else None
    if phase != "read":
        loss = cell_label_loss(student, features, batch.cells)
        measured["cells"] = loss.item()
    if phase != "see":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answers = answer_logits(student, batch, features)
        wanted = batch.targets != IGNORE
        losses = F.cross_entropy(answers.float(), batch.targets[wanted], reduction="none")
        answer_loss = (losses * batch.weights[wanted]).sum() / batch.weights[wanted].sum()
        loss = answer_loss + CELL_LOSS_WEIGHT * loss
        measured |= {"answers": answer_loss.item(), **exact_by_kind(batch, answers.argmax(-1))}
    student.step(loss, student.learners(phase))
    return measured


def means(measured: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over the steps that have it."""
    names = sorted({name for each in measured for name in each})
    return {name: round(fmean(each[name] for each in measured if name in each), 3) for name in names}


def cell_label_loss(student: Student, features: Tensor | None, cells: Tensor) -> Tensor:
    """Cross-entropy of what each visual token shows: symbols, shape, colour, value."""
    if features is None:
        return torch.zeros(())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = student.cell_logits(features).float().split(list(CELL_CLASSES.values()), dim=-1)
    losses = []
    for index, part in enumerate(parts):
        loss = F.cross_entropy(part.flatten(0, 1), cells[..., index].flatten(), reduction="none")
        named = cells[..., index].flatten() > 0
        # Each name by itself: bars and boxes are rare, and would drown in cells of text and in empty ones.
        if named.any():
            losses.append(loss[named].mean())
        losses.append(EMPTY_CELL_WEIGHT * loss[~named].mean())
    return sum(losses)


def answer_logits(student: Student, batch: Batch, features: Tensor | None) -> Tensor:
    """Logits [answer tokens, vocab] at every position whose next token belongs to an answer."""
    embeddings = F.embedding(batch.ids, student.weights["model.language_model.embed_tokens.weight"])
    if features is not None:
        pictured = batch.ids == student.image_token
        embeddings = embeddings.masked_scatter(pictured[..., None], features.flatten(0, 1).to(embeddings.dtype))
    hidden = student.decoder.run_layers(embeddings, batch.positions, visible=batch.visible)
    return student.decoder.logits(hidden[batch.targets != IGNORE])


@torch.no_grad()
def exact_by_kind(batch: Batch, guesses: Tensor) -> dict[str, float]:
    """Share of answers whose every token is right; with gold tokens before it, that is greedy decoding's share."""
    right: dict[str, list[bool]] = {}
    hits = torch.zeros_like(batch.targets, dtype=torch.bool)
    wanted = batch.targets != IGNORE
    hits[wanted] = guesses == batch.targets[wanted]
    for index, row in enumerate(batch.rows):
        length = len(row.ids)
        segments, answered = torch.tensor(row.segments), wanted[index, :length]
        for number in range(1, len(row.sample.questions) + 1):
            mine = answered & (segments == number)
            right.setdefault(row.sample.kind, []).append(bool(hits[index, :length][mine].all()))
    return {kind: sum(right[kind]) / len(right[kind]) for kind in right}


if __name__ == "__main__":
    typer.run(train)
