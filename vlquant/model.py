"""Open a model (published checkpoint or bundle) and read its tensors under canonical names."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlquant.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, Rows, open_checkpoint
from vlquant.config import ModelConfig, quantization_settings, read_config
from vlquant.decoder import LINEARS, Decoder, FloatLinear, float_layer
from vlquant.errors import BrokenCheckpoint, MissingDependency, UnsupportedCheckpoint
from vlquant.family import (
    LANGUAGE_MODEL,
    Fusion,
    fusion_groups,
    hf_stored_name,
    split_fused,
    split_kind,
    split_layer,
    stored_name,
)
from vlquant.layout import EMBEDDING, HEAD, POSITIONS, QUANTIZED_FORMS, layer_prefix, layer_shapes, tensor_shapes
from vlquant.lora import merge_adapters, refuse_remains
from vlquant.members import KNOWN_MODELS, nearest_names
from vlquant.packing import select_outputs

HUB_OWNER = "OpenGVLab"
READABLE = (None, "gptq", "bitsandbytes")
"""What may have quantized a checkpoint."""
GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 2}
PACKED_KINDS = ("qweight", "qzeros", "scales", "g_idx")
HUB_FILES = (SINGLE_FILE, INDEX_FILE, "model-*.safetensors", "*.json", "tokenizer.model", "vocab.json", "merges.txt")


class Model:
    """Settings and tensors of one model; tensors are read when asked for."""

    def __init__(self, folder: Path, config: ModelConfig, checkpoint: Checkpoint):
        self.folder, self.config, self.checkpoint = folder, config, checkpoint
        self.gptq_version = 1
        self._shapes = tensor_shapes(config)
        self._last_split: tuple[str, list[Tensor]] = ("", [])

    def has(self, name: str) -> bool:
        """Whether a tensor with canonical `name` can be read."""
        if name in self.checkpoint:
            return True
        if name == HEAD and self.config.decoder.tied_head:
            return self.has(EMBEDDING)
        return self._stored(name)[0] in self.checkpoint

    def tensor(self, name: str) -> Tensor:
        """The tensor with canonical `name`, in its stored dtype; fused ones are split.

        Raises BrokenCheckpoint if the checkpoint has none.
        """
        if name == HEAD and self.config.decoder.tied_head:
            return self.tensor(EMBEDDING)
        tensor = self.checkpoint.read(name) if name in self.checkpoint else self._read_stored(name)
        return fit_positions(tensor, self._shapes[name][1]) if name == POSITIONS else tensor

    def stored_dtype(self, name: str) -> torch.dtype:
        """Precision in which the tensor with canonical `name` is stored."""
        return self.checkpoint.find(name if name in self.checkpoint else self._stored(name)[0]).dtype

    @cached_property
    def embedding_rows(self) -> Rows:
        """From ids [count] to rows [count, hidden_size] of the embedding, without reading the others; its file stays open."""
        return self.checkpoint.open_rows(EMBEDDING if EMBEDDING in self.checkpoint else self._stored(EMBEDDING)[0])

    def decoder_layer(self, index: int) -> dict[str, Tensor]:
        """All tensors of decoder layer `index` by relative name ("self_attn.q_proj.weight", ".qweight", ...)."""
        prefix = layer_prefix(index)
        names = [name for name in self.checkpoint if name.startswith(prefix)]
        names = names or [form for name in layer_shapes(self.config.decoder, index) for form in self._forms(name)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}

    def _forms(self, name: str) -> list[str]:
        """What there is of the tensor with canonical `name`: itself, or what GPTQ made of it."""
        if self.has(name):
            return [name]
        packed = [f"{name.removesuffix('weight')}{kind}" for kind in PACKED_KINDS]
        return [each for each in packed if self.has(each)]

    def vision_tensors(self) -> dict[str, Tensor]:
        """All tensors of vision tower and projector, named without the leading "model."."""
        parts = ("model.vision_tower.", "model.multi_modal_projector.")
        return {name.removeprefix("model."): self.tensor(name) for name in self._shapes if name.startswith(parts)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor with canonical `name` as stored, without reading it.

        Raises BrokenCheckpoint if it is absent or a fused tensor does not hold it.
        """
        if name in self.checkpoint:
            return self.checkpoint.shape(name)
        stored, fusion = self._stored(name)
        shape = self.checkpoint.shape(stored)
        if fusion is None:
            return shape
        rows = self._fused_rows(fusion, name)
        if shape[0] != sum(rows):
            raise BrokenCheckpoint(f"{self.folder}: {stored} has {shape[0]} rows, config.json asks for {sum(rows)}")
        return (rows[self._part(fusion, name)], *shape[1:])

    def stored_name(self, name: str) -> str:
        """Name in the files of the tensor, perhaps a fused one, that holds the one with canonical `name`."""
        return name if name in self.checkpoint else self._stored(name)[0]

    def _stored(self, name: str) -> tuple[str, Fusion | None]:
        alias = hf_stored_name(name)
        if alias in self.checkpoint:
            return alias, None
        try:
            return stored_name(name, self.config.family)
        except KeyError:
            return name, None

    def _read_stored(self, name: str) -> Tensor:
        stored, fusion = self._stored(name)
        if fusion is None:
            return self.checkpoint.read(stored)
        # The parts of one fused tensor are asked for one after the other: read it once.
        if self._last_split[0] != stored:
            rows, groups = self._fused_rows(fusion, name), fusion_groups(fusion, self.config)
            self._last_split = stored, split_stored(self.checkpoint.read(stored), stored, rows=rows, groups=groups)
        return self._last_split[1][self._part(fusion, name)].clone()

    def _fused_rows(self, fusion: Fusion, name: str) -> Sequence[int]:
        layer, kind = split_layer(name)[1], split_kind(name)[1]
        kind = ".weight" if kind.removeprefix(".") in PACKED_KINDS else kind
        return [self._shapes[part.format(layer) + kind][0] for part in fusion.parts]

    def _part(self, fusion: Fusion, name: str) -> int:
        return fusion.parts.index(split_kind(split_layer(name)[0])[0])


def split_stored(fused: Tensor, stored: str, *, rows: Sequence[int], groups: int) -> list[Tensor]:
    """Undo a fusion as `split_fused`, of float weights or of one of the tensors that GPTQ stores for them."""
    kind = stored.rpartition(".")[2]
    if kind not in PACKED_KINDS:
        return split_fused(fused, rows=rows, groups=groups)
    outputs = split_fused(torch.arange(sum(rows)), rows=rows, groups=groups)
    return [select_outputs(kind, fused, each, sum(rows)) for each in outputs]


def fit_positions(positions: Tensor, length: int) -> Tensor:
    """Position embeddings [1, 1 + patches, hidden] for `length` positions, resized as the original does.

    Bicubic, in float32, the class token's untouched; nothing happens at the native size.
    """
    if positions.shape[1] == length:
        return positions
    side, wanted = math.isqrt(positions.shape[1] - 1), math.isqrt(length - 1)
    grid = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    patches = grid.flatten(2).permute(0, 2, 1).to(positions.dtype)  # [1, wanted * wanted, hidden]
    return torch.cat((positions[:, :1], patches), dim=1)


def open_model(folder: str | Path, *, whole: bool = True) -> Model:
    """Open the checkpoint or bundle in `folder` and check that it is complete; without `whole`, as far as headers tell.

    Raises BrokenCheckpoint naming the tensors that are missing or have the wrong shape,
    UnsupportedCheckpoint for models this version cannot run.
    """
    config = read_config(folder)
    model = Model(Path(folder), config, merge_adapters(open_checkpoint(folder, whole=whole), config.source))
    model.gptq_version = gptq_version(quantization_settings(Path(folder)), folder)
    missing = [name for name in tensor_shapes(config) if not model.has(name) and not is_quantized(model, name)]
    if missing:
        raise BrokenCheckpoint(f"{folder} lacks {_some(missing, model)}; download the checkpoint again")
    for name, expected in tensor_shapes(config).items():
        if not is_quantized(model, name):
            _check_shape(model, name, expected)
    refuse_remains(model.checkpoint, {model.stored_name(name) for name in tensor_shapes(config)})
    return model


def gptq_version(settings: Mapping, folder: str | Path) -> int:
    """Which version of GPTQ's format a checkpoint with these quantization settings has, 1 if it has another format or none.

    Raises UnsupportedCheckpoint for what vlquant does not read.
    """
    method = settings.get("quant_method")
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if method not in READABLE or (method == "gptq" and form not in GPTQ_FORMATS):
        name = method if method not in READABLE else f"{method} in the format {form}"
        raise UnsupportedCheckpoint(
            f"{folder} is quantized with {name}, which vlquant does not read; take the unquantized checkpoint and quantize that"
        )
    return GPTQ_FORMATS[form] if method == "gptq" else 1


def is_quantized(model: Model, name: str) -> bool:
    """Whether the weight with canonical `name` is stored in one of the quantized forms."""
    module = name.removesuffix(".weight")
    if not module.startswith(LANGUAGE_MODEL) or not module.endswith(LINEARS) or module == name:
        return False
    return any(all(model.has(module + kind) for kind in form) for form in QUANTIZED_FORMS)


def _check_shape(model: Model, name: str, expected: tuple[int, ...]) -> None:
    shape = model.shape(name)
    if name == POSITIONS and len(shape) == 3 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1:
        expected = (1, shape[1], expected[2])
    if shape != expected:
        raise BrokenCheckpoint(
            f"{model.folder}: {_with_stored(name, model)} has shape {list(shape)} but config.json asks for "
            f"{list(expected)}; config.json and weights must come from the same checkpoint"
        )


def _some(names: list[str], model: Model) -> str:
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(_with_stored(name, model) for name in names[:3]) + more


def _with_stored(name: str, model: Model) -> str:
    """A name the user can find in the files: the stored one, with ours if it differs."""
    if any(each.startswith(LANGUAGE_MODEL) for each in model.checkpoint):
        return name
    stored = model._stored(name)[0]
    return stored if stored == name else f"{stored} ({name.removeprefix('model.')})"


def float_decoder(model: Model, dtype: torch.dtype = torch.float32) -> Decoder:
    """The whole language model in float: the reference. Needs memory for all of its weights."""
    config = model.config.decoder
    layers = []
    for index in range(config.layers):
        tensors = {name: tensor.to(dtype) for name, tensor in model.decoder_layer(index).items()}
        layers.append(float_layer(tensors, config))
    embedding = model.tensor(EMBEDDING).to(dtype)
    head = embedding if config.tied_head else model.tensor(HEAD).to(dtype)
    norm = model.tensor(LANGUAGE_MODEL + "norm.weight").to(dtype)
    return Decoder(config, embedding=embedding, layers=layers, norm=norm, head=FloatLinear(head))


def resolve_model(name: str | Path, *, network: bool = True) -> Path:
    """The folder of a model named by path, by published name ("InternVL2_5-8B") or by hub id ("owner/name").

    Local folders win; otherwise weights, configuration and tokenizer files are downloaded, never code; without
    `network`, only an earlier download is found.
    Raises BrokenCheckpoint for a missing folder, UnsupportedCheckpoint for an unknown name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = str(name)
    if path.exists():
        raise BrokenCheckpoint(f"{name} is a file; give the folder that holds config.json and the weights")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise BrokenCheckpoint(f"folder {name} does not exist; give an existing folder or a name such as InternVL2_5-8B")
    if "/" in text:
        return _download(text, network=network)
    if text not in KNOWN_MODELS:
        nearest = nearest_names(text, KNOWN_MODELS)
        raise UnsupportedCheckpoint(
            f"{text!r} is neither a folder here nor a known model; the nearest known names are {nearest}"
        )
    return _download(f"{HUB_OWNER}/{text}", network=network)


def _download(hub_id: str, *, network: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependency(
            f"{hub_id} is not a folder here, and downloading it needs huggingface_hub; run `pip install huggingface_hub`"
        ) from None
    try:
        offline = {} if network else {"local_files_only": True}
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES), **offline))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BrokenCheckpoint(
            f"{hub_id} is not a folder here and cannot be downloaded ({reason}); check name and network, or give a folder"
        ) from None
