"""Architecture facts as data: where each language model and the vision tower keep their tensors.

Adding a family is adding a row to `FAMILIES`. Knows no files; inside vlquant every tensor has its
canonical name (the in-memory names of transformers' `-hf` InternVL), original names exist only here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlquant.decoder import LINEARS, NORMS

LANGUAGE_MODEL = "model.language_model."
_LAYER = LANGUAGE_MODEL + "layers.{}."


@dataclass(frozen=True)
class Fusion:
    """One stored tensor that holds several of ours, stacked along its rows."""

    source: str
    """Stored module name; `{}` stands for the layer index."""
    parts: tuple[str, ...]
    """Canonical module names in stacking order, in the same form."""
    per_key_value_head: bool = False
    """Rows are stacked anew for every key/value head (InternLM2) instead of once."""


@dataclass(frozen=True)
class LanguageFamily:
    """What distinguishes one language model class from the others."""

    architecture: str
    """`llm_config.architectures[0]`."""
    text_model_type: str
    """transformers' class that computes the same from the canonical tensors."""
    names: Mapping[str, str]
    """Canonical module name -> stored module name, `{}` for the layer index."""
    fusions: tuple[Fusion, ...] = ()
    honours_rope_scaling: bool = True
    """False where the original ignores `rope_scaling` (Qwen2)."""
    query_key_value_bias: bool | str = False
    """True or False, or the config key that says so."""
    output_bias: bool | str = False
    query_key_norm: bool = False
    """RMSNorm over each query and key head."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What the original's configuration class takes where llm_config is silent, unless the same for all."""
    shows_special_tokens: bool = False
    """The original decodes answers with special tokens left in (InternVL 3.5)."""


def _language_names(top: Mapping[str, str], layer: Mapping[str, str]) -> dict[str, str]:
    """Full canonical -> stored names from those of the top level and of one layer."""
    names = {_LAYER + ours: "language_model.model.layers.{}." + theirs for ours, theirs in layer.items()}
    return {**{ours: "language_model." + theirs for ours, theirs in top.items()}, **names}


_LLAMA_NAMES = _language_names(
    {
        LANGUAGE_MODEL + "embed_tokens": "model.embed_tokens",
        LANGUAGE_MODEL + "norm": "model.norm",
        "lm_head": "lm_head",
    },
    {name: name for name in (*LINEARS, *NORMS, "self_attn.q_norm", "self_attn.k_norm")},
)
_INTERNLM2_NAMES = _language_names(
    {
        LANGUAGE_MODEL + "embed_tokens": "model.tok_embeddings",
        LANGUAGE_MODEL + "norm": "model.norm",
        "lm_head": "output",
    },
    {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    },
)
_QUERY_KEY_VALUE = tuple(_LAYER + name for name in LINEARS[:3])
_GATE_UP = tuple(_LAYER + name for name in LINEARS[4:6])
_INTERNLM2_QUERY_KEY_VALUE = Fusion(
    source="language_model.model.layers.{}.attention.wqkv", parts=_QUERY_KEY_VALUE, per_key_value_head=True
)
_PHI3_FUSIONS = (
    Fusion(source="language_model.model.layers.{}.self_attn.qkv_proj", parts=_QUERY_KEY_VALUE),
    Fusion(source="language_model.model.layers.{}.mlp.gate_up_proj", parts=_GATE_UP),
)

FAMILIES = {
    row.architecture: row
    for row in (
        LanguageFamily(
            architecture="InternLM2ForCausalLM",
            text_model_type="llama",
            names=_INTERNLM2_NAMES,
            fusions=(_INTERNLM2_QUERY_KEY_VALUE,),
            query_key_value_bias="bias",
            output_bias="bias",
            defaults={"bias": True},
        ),
        LanguageFamily(
            architecture="Qwen2ForCausalLM",
            text_model_type="qwen2",
            names=_LLAMA_NAMES,
            # transformers 4.37.2's Qwen2, the reference, does not look at rope_scaling.
            honours_rope_scaling=False,
            query_key_value_bias=True,
        ),
        LanguageFamily(
            architecture="LlamaForCausalLM",
            text_model_type="llama",
            names=_LLAMA_NAMES,
            query_key_value_bias="attention_bias",
            output_bias="attention_bias",
        ),
        LanguageFamily(
            architecture="Qwen3ForCausalLM",
            text_model_type="qwen3",
            names=_LLAMA_NAMES,
            query_key_value_bias="attention_bias",
            output_bias="attention_bias",
            query_key_norm=True,
            defaults={"head_dim": 128},
            shows_special_tokens=True,
        ),
        LanguageFamily(
            architecture="Phi3ForCausalLM",
            # Apart, not fused, its tensors are a Llama's; and transformers' Llama knows long rope.
            text_model_type="llama",
            names=_LLAMA_NAMES,
            fusions=_PHI3_FUSIONS,
            defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        ),
    )
}

_TOWER = "model.vision_tower."
_TOWER_LAYER = _TOWER + "encoder.layer.{}."
_STORED_LAYER = "vision_model.encoder.layers.{}."

VISION_NAMES = {
    _TOWER + "embeddings.cls_token": "vision_model.embeddings.class_embedding",
    _TOWER + "embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    _TOWER + "embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    _TOWER_LAYER + "attention.projection_layer": _STORED_LAYER + "attn.proj",
    _TOWER_LAYER + "attention.q_norm": _STORED_LAYER + "attn.q_norm",
    _TOWER_LAYER + "attention.k_norm": _STORED_LAYER + "attn.k_norm",
    _TOWER_LAYER + "layernorm_before": _STORED_LAYER + "norm1",
    _TOWER_LAYER + "layernorm_after": _STORED_LAYER + "norm2",
    _TOWER_LAYER + "lambda_1": _STORED_LAYER + "ls1",
    _TOWER_LAYER + "lambda_2": _STORED_LAYER + "ls2",
    _TOWER_LAYER + "mlp.fc1": _STORED_LAYER + "mlp.fc1",
    _TOWER_LAYER + "mlp.fc2": _STORED_LAYER + "mlp.fc2",
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
}
VISION_FUSIONS = (
    Fusion(
        source=_STORED_LAYER + "attn.qkv",
        parts=tuple(_TOWER_LAYER + "attention." + name for name in ("q_proj", "k_proj", "v_proj")),
    ),
)


def split_layer(name: str) -> tuple[str, str | None]:
    """A tensor name with its layer index cut out: "a.7.b" -> ("a.{}.b", "7"); no index -> (name, None)."""
    match = re.search(r"\.(?:layers|layer)\.(\d+)\.", name)
    if match is None:
        return name, None
    return name[: match.start(1)] + "{}" + name[match.end(1) :], match.group(1)


def split_kind(name: str) -> tuple[str, str]:
    """A tensor name as (module, kind): kind is ".weight", ".bias", one of GPTQ's, or "" for bare parameters."""
    for kind in (".weight", ".bias", ".qweight", ".qzeros", ".scales", ".g_idx"):
        if name.endswith(kind):
            return name.removesuffix(kind), kind
    return name, ""


def stored_name(name: str, family: LanguageFamily) -> tuple[str, Fusion | None]:
    """Where the original layout keeps the tensor with canonical `name`.

    Returns its stored name and, if that tensor holds others as well, how they are stacked.
    Raises KeyError for a name no InternVL has.
    """
    pattern, layer = split_layer(name)
    module, kind = split_kind(pattern)
    for fusion in family.fusions + VISION_FUSIONS:
        if module in fusion.parts:
            return fusion.source.format(layer) + kind, fusion
    stored = family.names.get(module) or VISION_NAMES[module]
    return stored.format(layer) + kind, None


def hf_stored_name(name: str) -> str:
    """Where `-hf` checkpoints of transformers before 4.53, and what version 5 saves, keep the tensor with canonical `name`.

    The others keep it under `name` itself.
    """
    if name.startswith(LANGUAGE_MODEL):
        return "language_model.model." + name.removeprefix(LANGUAGE_MODEL)
    return "language_model." + name if name.startswith("lm_head.") else name.removeprefix("model.")


def split_fused(fused: Tensor, *, rows: Sequence[int], groups: int) -> list[Tensor]:
    """Undo a fusion: cut `fused` [sum(rows), ...] into tensors of the given numbers of rows.

    groups: how often the stacking repeats: 1, or the number of key/value heads.
    """
    per_group = [count // groups for count in rows]
    grouped = fused.reshape(groups, sum(per_group), *fused.shape[1:])
    return [part.reshape(-1, *fused.shape[1:]).contiguous() for part in grouped.split(per_group, dim=1)]


def join_fused(parts: Sequence[Tensor], *, groups: int) -> Tensor:
    """The inverse of `split_fused`."""
    grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])


def original_tensors(canonical: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """The published layout of `canonical` tensors: original names, fused where the family fuses.

    config: the ModelConfig of the checkpoint. Raises KeyError if a part of a fused tensor is missing.
    """
    stored = {}
    for name, tensor in canonical.items():
        target, fusion = stored_name(name, config.family)
        if fusion is None:
            stored[target] = tensor
        elif target not in stored:
            layer, kind = split_layer(name)[1], split_kind(name)[1]
            parts = [canonical[part.format(layer) + kind] for part in fusion.parts]
            stored[target] = join_fused(parts, groups=fusion_groups(fusion, config))
    return stored


def fusion_groups(fusion: Fusion, config) -> int:
    """How often the stacking of `fusion` repeats in a checkpoint of this ModelConfig."""
    return config.decoder.key_value_heads if fusion.per_key_value_head else 1
