"""LoRA adapters that fine-tuning left inside a checkpoint: found by their names and merged while tensors are read.

InternVL's training wraps vision tower and language model by PEFT, with alpha = 2 x rank, and notes only the rank in
config.json (use_backbone_lora, use_llm_lora); its merge tool computes what is computed here.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vlquant.checkpoint import Checkpoint, Rows
from vlquant.errors import UnsupportedCheckpoint

WRAPPER = "base_model.model."
BASE = ".base_layer"
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
RANK_KEYS = {"vision_model.": "use_backbone_lora", "language_model.": "use_llm_lora"}
SCALE = 2.0
"""alpha / rank, the same in every InternVL training script."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
MARKS = re.compile(
    r"base_model\.model\.|\.base_layer|\.lora_|\.modules_to_save|\.original_module|prompt_encoder|prompt_embeddings|\.default(\.|$)"
)
"""What PEFT leaves in names: its wrappers, its methods, and "default", which every adapter of InternVL's training is called."""


@dataclass(frozen=True)
class Adapter:
    """Stored names of the two factors of one linear's change."""

    down: str
    """[rank, in_features]."""
    up: str
    """[out_features, rank]."""


class MergedCheckpoint(Checkpoint):
    """A wrapped checkpoint under the names it had before wrapping, adapters added to their weights."""

    def __init__(self, wrapped: Checkpoint, adapters: Mapping[str, Adapter]):
        tensors = {plain_name(name): wrapped.find(name) for name in wrapped if ".lora_" not in name}
        super().__init__(wrapped.folder, tensors)
        self.wrapped, self.adapters = wrapped, adapters

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype; a change by LoRA is added in float32 and rounded once."""
        tensor, adapter = super().read(name), self.adapters.get(name)
        if adapter is None:
            return tensor
        down, up = (self.wrapped.read(each).float() for each in (adapter.down, adapter.up))
        return (tensor.float() + SCALE * up @ down).to(tensor.dtype)

    def open_rows(self, name: str) -> Rows:
        """A way to read some rows of a tensor, adapters added."""
        return self.read(name).__getitem__ if name in self.adapters else super().open_rows(name)


def merge_adapters(checkpoint: Checkpoint, config: Mapping) -> Checkpoint:
    """`checkpoint` itself, or one that reads as if its LoRA adapters had been merged.

    config: config.json in the original's words. Raises UnsupportedCheckpoint for adapters that cannot be merged
    without guessing: of unknown scale, of another kind than plain LoRA, or in files of their own.
    """
    refuse_adapter_files(checkpoint.folder)
    if not any(WRAPPER in name or BASE in name or ".lora_" in name for name in checkpoint):
        return checkpoint
    strange = [name for name in checkpoint if ".lora_" in name and not name.endswith((DOWN, UP))]
    if strange:
        raise no_plain_lora(checkpoint, strange[0])
    linears = sorted({name.removesuffix(kind) for name in checkpoint for kind in (DOWN, UP) if name.endswith(kind)})
    adapters = {}
    for linear in linears:
        adapter = Adapter(linear + DOWN, linear + UP)
        require_known_scale(checkpoint, adapter, config)
        adapters[plain_name(linear) + ".weight"] = adapter
    merged = MergedCheckpoint(checkpoint, adapters)
    for name, adapter in adapters.items():
        expected = (*checkpoint.shape(adapter.up)[:1], *checkpoint.shape(adapter.down)[1:])
        if name not in merged or merged.shape(name) != expected:
            raise no_plain_lora(checkpoint, adapter.down)
    return merged


def refuse_remains(checkpoint: Checkpoint, used: Set[str]) -> None:
    """Raise UnsupportedCheckpoint if training left anything that reading the model does not take into account.

    used: stored names, as before wrapping, of all tensors of the model.
    """
    left = [name for name in checkpoint.adapters if name not in used]
    stored = getattr(checkpoint, "wrapped", checkpoint)
    left += [name for name in stored if MARKS.search(name) and ".lora_" not in name and plain_name(name) not in used]
    if left:
        raise no_plain_lora(checkpoint, left[0])


def no_plain_lora(checkpoint: Checkpoint, name: str) -> UnsupportedCheckpoint:
    """The error for what fine-tuning has left and cannot be merged."""
    return UnsupportedCheckpoint(
        f"{checkpoint.folder} holds {name}, which is no plain LoRA of this model; merge the adapters with the tool that trained them"
    )


def require_known_scale(checkpoint: Checkpoint, adapter: Adapter, config: Mapping) -> None:
    """Raise UnsupportedCheckpoint unless the adapter has both factors and the rank that config.json notes."""
    key = next((key for start, key in RANK_KEYS.items() if adapter.down.startswith(start)), None)
    both = adapter.up in checkpoint and adapter.down in checkpoint
    rank, noted = checkpoint.shape(adapter.down)[0] if both else None, config.get(key) if key else None
    if not both or rank != noted:
        reason = f"rank {rank} where config.json notes {key or 'no rank'} {noted}" if both else "only one factor"
        raise UnsupportedCheckpoint(
            f"{checkpoint.folder}: the LoRA adapter {adapter.down.removesuffix(DOWN)} has {reason}, so its scale is unknown; "
            "merge the adapters with the tool that trained them"
        )


def refuse_adapter_files(folder: Path) -> None:
    """Raise UnsupportedCheckpoint if a PEFT adapter lies beside the weights: nobody says whether they contain it."""
    found = [path for name in ADAPTER_FILES for pattern in (name, f"*/{name}") for path in folder.glob(pattern)]
    if found:
        raise UnsupportedCheckpoint(
            f"{folder} holds a PEFT adapter ({found[0].relative_to(folder)}) of its own; merge it into the weights and remove its files"
        )


def plain_name(stored: str) -> str:
    """A tensor's name before PEFT wrapped the model."""
    return stored.replace(WRAPPER, "", 1).replace(BASE, "")
