"""The published InternVL models as data: shapes for `vlquant synthesize`, names for messages. Readers of checkpoints never look here.

Shapes come from the published config.json, from the model card, or ("unverified") from the documented shape of the language
model underneath; `Member.source` says which.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Tower:
    """An InternViT."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    norm: str
    query_key_norm: bool
    query_key_value_bias: bool


@dataclass(frozen=True)
class Member:
    """One published model."""

    tower: Tower
    architecture: str
    """Class of the language model."""
    template: str
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float = 1e6
    max_positions: int = 32768
    norm_eps: float = 1e-6
    more: dict = field(default_factory=dict)
    """Further entries of llm_config."""
    source: str = "config.json"


PUBLISHED, CARD, UNVERIFIED = "config.json", "model card", "unverified"

INTERNVIT_300M = Tower(1024, 24, 16, 4096, "layer_norm", query_key_norm=False, query_key_value_bias=True)
INTERNVIT_6B = Tower(3200, 45, 25, 12800, "rms_norm", query_key_norm=True, query_key_value_bias=False)


def _internlm2(tower: Tower, template: str, *shape: int, factor: float = 2.0, source: str = PUBLISHED) -> Member:
    more = {"rope_scaling": {"type": "dynamic", "factor": factor}, "bias": False, "pad_token_id": 2}
    return Member(tower, "InternLM2ForCausalLM", template, *shape, 92553, norm_eps=1e-5, more=more, source=source)


def _qwen2(tower: Tower, *shape: int, version: str = "2.5", source: str = PUBLISHED) -> Member:
    more = {"rope_scaling": {"type": "dynamic", "factor": 2.0}} if version == "3" else {}
    if version == "2":
        return Member(tower, "Qwen2ForCausalLM", "Hermes-2", *shape, 151655, more=more, source=source)
    return Member(tower, "Qwen2ForCausalLM", "internvl2_5", *shape, 151674, more=more, source=source)


def _qwen3(tower: Tower, *shape: int, tied: bool = False, source: str = UNVERIFIED) -> Member:
    more = {"head_dim": 128, "tie_word_embeddings": tied, "attention_bias": False}
    return Member(tower, "Qwen3ForCausalLM", "internvl2_5", *shape, 151936, max_positions=40960, more=more, source=source)


def _phi3() -> Member:
    # The factors of the published file are longer numbers; what they do to speed and memory is the same.
    factors = {"short_factor": [1 + 0.03 * index for index in range(48)], "long_factor": [1.04**index for index in range(48)]}
    more = {"rope_scaling": {"type": "su", **factors}, "original_max_position_embeddings": 4096, "pad_token_id": 32000}
    more["sliding_window"] = 262144
    shape = 3072, 32, 32, 32, 8192, 32020
    return Member(INTERNVIT_300M, "Phi3ForCausalLM", "phi3-chat", *shape, 1e4, 131072, 1e-5, more, source=CARD)


_1_8B, _7B, _20B = (2048, 24, 16, 8, 8192), (4096, 32, 32, 8, 14336), (6144, 48, 48, 8, 16384)
_0_5B, _3B, _32B, _72B = (896, 24, 14, 2, 4864), (2048, 36, 16, 2, 11008), (5120, 64, 40, 8, 27648), (8192, 80, 64, 8, 29568)

MEMBERS: dict[str, Member] = {
    "Mini-InternVL-Chat-2B-V1-5": _internlm2(INTERNVIT_300M, "internlm2-chat", *_1_8B),
    "Mini-InternVL-Chat-4B-V1-5": _phi3(),
    "InternVL-Chat-V1-5": _internlm2(INTERNVIT_6B, "internlm2-chat", *_20B, factor=3.0),
    "InternVL2-1B": _qwen2(INTERNVIT_300M, *_0_5B, version="2"),
    "InternVL2-2B": _internlm2(INTERNVIT_300M, "internlm2-chat", *_1_8B),
    "InternVL2-4B": _phi3(),
    "InternVL2-8B": _internlm2(INTERNVIT_300M, "internlm2-chat", *_7B),
    "InternVL2-26B": _internlm2(INTERNVIT_6B, "internlm2-chat", *_20B, factor=3.0),
    "InternVL2-40B": Member(
        INTERNVIT_6B, "LlamaForCausalLM", "Hermes-2", 7168, 60, 56, 8, 20480, 64009, 5e6, 4096, 1e-5, source=UNVERIFIED
    ),
    "InternVL2-Llama3-76B": Member(
        INTERNVIT_6B, "LlamaForCausalLM", "internlm2-chat", 8192, 80, 64, 8, 28672, 128265, 5e5, 8192, 1e-5, source=UNVERIFIED
    ),
    "InternVL2_5-1B": _qwen2(INTERNVIT_300M, *_0_5B),
    "InternVL2_5-2B": _internlm2(INTERNVIT_300M, "internvl2_5", *_1_8B),
    "InternVL2_5-4B": _qwen2(INTERNVIT_300M, *_3B),
    "InternVL2_5-8B": _internlm2(INTERNVIT_300M, "internvl2_5", *_7B),
    "InternVL2_5-26B": _internlm2(INTERNVIT_6B, "internvl2_5", *_20B, source=CARD),
    "InternVL2_5-38B": _qwen2(INTERNVIT_6B, *_32B, source=UNVERIFIED),
    "InternVL2_5-78B": _qwen2(INTERNVIT_6B, *_72B, source=UNVERIFIED),
    "InternVL3-1B": _qwen2(INTERNVIT_300M, *_0_5B, version="3"),
    "InternVL3-2B": _qwen2(INTERNVIT_300M, 1536, 28, 12, 2, 8960, version="3", source=UNVERIFIED),
    "InternVL3-8B": _qwen2(INTERNVIT_300M, 3584, 28, 28, 4, 18944, version="3", source=UNVERIFIED),
    "InternVL3-14B": _qwen2(INTERNVIT_300M, 5120, 48, 40, 8, 13824, version="3", source=UNVERIFIED),
    "InternVL3-38B": _qwen2(INTERNVIT_6B, *_32B, version="3", source=UNVERIFIED),
    "InternVL3-78B": _qwen2(INTERNVIT_6B, *_72B, version="3", source=UNVERIFIED),
    "InternVL3_5-1B": _qwen3(INTERNVIT_300M, 1024, 28, 16, 8, 3072, tied=True),
    "InternVL3_5-2B": _qwen3(INTERNVIT_300M, 2048, 28, 16, 8, 6144, tied=True),
    "InternVL3_5-4B": _qwen3(INTERNVIT_300M, 2560, 36, 32, 8, 9728, tied=True),
    "InternVL3_5-8B": _qwen3(INTERNVIT_300M, 4096, 36, 32, 8, 12288, source=PUBLISHED),
    "InternVL3_5-14B": _qwen3(INTERNVIT_300M, 5120, 40, 40, 8, 17408),
    "InternVL3_5-38B": _qwen3(INTERNVIT_6B, 5120, 64, 64, 8, 25600),
}

KNOWN_MODELS = (*MEMBERS, "InternVL3-9B")
"""Published models of the supported families; the shape of the last is known to its config.json alone."""


def nearest_names(name: str, known: Iterable[str]) -> str:
    """The names most like a mistyped one, for a message."""
    names = tuple(known)
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3])


def member_config(member: Member) -> dict:
    """config.json of a member, as it is published."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": member.template,
        "force_image_size": 448,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "torch_dtype": "bfloat16",
        "llm_config": {
            "architectures": [member.architecture],
            "hidden_size": member.hidden_size,
            "num_hidden_layers": member.layers,
            "num_attention_heads": member.heads,
            "num_key_value_heads": member.key_value_heads,
            "intermediate_size": member.intermediate_size,
            "vocab_size": member.vocab_size,
            "max_position_embeddings": member.max_positions,
            "rope_theta": member.rope_theta,
            "rms_norm_eps": member.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **member.more,
        },
        "vision_config": tower_config(member.tower),
    }


def tower_config(tower: Tower) -> dict:
    """vision_config of an InternViT."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": tower.hidden_size,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.intermediate_size,
        "image_size": 448,
        "patch_size": 14,
        "num_channels": 3,
        "norm_type": tower.norm,
        "layer_norm_eps": 1e-6,
        "qkv_bias": tower.query_key_value_bias,
        "qk_normalization": tower.query_key_norm,
        "hidden_act": "gelu",
        "torch_dtype": "bfloat16",
    }


def shortened(member: Member, *, layers: int | None, vision_layers: int | None) -> Member:
    """A member with fewer layers, each as wide as before."""
    tower = member.tower if vision_layers is None else replace(member.tower, layers=vision_layers)
    return replace(member, tower=tower, layers=member.layers if layers is None else layers)
