"""The first difference between two traces, in the order in which a model reads: prompt, ids, features, logits, answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlquant.errors import InvalidRequest

TOLERANCE = 1e-4
"""Absolute, of float32 features and logits."""
KEYS = "keys"
"""Metadata: the calls' keys in their order, as a JSON list."""
CONTEXT = 30
"""Characters shown around a difference of texts."""


def first_difference(first: str | Path, second: str | Path, *, tolerance: float = TOLERANCE) -> str | None:
    """A sentence about the first difference of two trace files; None if there is none.

    tolerance: what features and logits may differ by, absolutely. Raises InvalidRequest for a file that is no trace.
    """
    with open_trace(first) as one, open_trace(second) as other:
        return next(differences(one, other, tolerance), None)


def open_trace(path: str | Path):
    """A trace file, opened; raises InvalidRequest if it is none."""
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise InvalidRequest(f"{path} cannot be read as a trace ({error}); write one with vlquant trace") from None
    try:
        keys = json.loads((file.metadata() or {})[KEYS])
    except (KeyError, ValueError):
        keys = None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InvalidRequest(f"{path} is no trace, for it names no calls; write one with vlquant trace")
    return file


def differences(one, other, tolerance: float) -> Iterator[str]:
    """All differences, in reading order."""
    texts, other_texts = one.metadata(), other.metadata()
    keys, other_keys = json.loads(texts[KEYS]), json.loads(other_texts[KEYS])
    if keys != other_keys:
        yield f"the calls differ: {', '.join(keys)} and {', '.join(other_keys)}"
    for key in (key for key in keys if key in other_keys):
        yield from differing_text(f"{key}/prompt", texts, other_texts)
        for name in ("input_ids", "attention_mask"):
            yield from differing_tensor(f"{key}/{name}", one, other, 0)
        for name in ("features", "prefill_logits"):
            yield from differing_tensor(f"{key}/{name}", one, other, tolerance)
        yield from differing_tensor(f"{key}/generated_ids", one, other, 0)
        yield from differing_text(f"{key}/response", texts, other_texts)


def differing_text(name: str, texts, other_texts) -> Iterator[str]:
    """The first character at which two texts part."""
    first, second = texts.get(name, ""), other_texts.get(name, "")
    if first != second:
        pairs = enumerate(zip(first, second, strict=False))
        at = next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
        around = slice(max(0, at - CONTEXT), at + CONTEXT)
        yield f"{name} differs from character {at}: {first[around]!r} and {second[around]!r}"


def differing_tensor(name: str, one, other, tolerance: float) -> Iterator[str]:
    """The first element by which two tensors differ beyond `tolerance`; padded positions of logits do not count."""
    found = [file.get_tensor(name) if name in file.keys() else None for file in (one, other)]  # noqa: SIM118
    first, second = found
    if first is None or second is None:
        if first is not second:
            yield f"{name} is in one of the traces only"
        return
    if first.shape != second.shape:
        yield f"{name} has shape {list(first.shape)} and {list(second.shape)}"
        return
    same = (first == second) | (first != first) & (second != second)  # Infinity and not-a-number equal themselves.
    wrong = ~(same | ((first.double() - second.double()).abs() <= tolerance))
    mask = name.replace("prefill_logits", "attention_mask")
    if name.endswith("/prefill_logits") and mask in one.keys():  # noqa: SIM118
        wrong &= one.get_tensor(mask).bool()[..., None]
    if wrong.any():
        yield describe(name, first, second, wrong)


def describe(name: str, first: Tensor, second: Tensor, wrong: Tensor) -> str:
    """Where two tensors of one shape first differ, and by how much at most."""
    place = tuple(wrong.nonzero()[0].tolist())
    here = f"{name}{list(place)} is {first[place].item():g} and {second[place].item():g}"
    if not first.is_floating_point():
        return here
    largest = torch.where(wrong, (first - second).abs(), torch.zeros(())).max().item()
    return f"{here}; {int(wrong.sum())} of {wrong.numel()} values differ, by at most {largest:.2g}"
