"""transformers' InternVL config.json (`-hf` checkpoints) in the words of the original `internvl_chat`. Reads no weights."""

from collections.abc import Mapping

from vlquant.errors import UnsupportedCheckpoint

MODEL_TYPE = "internvl"
TEMPLATE = "internvl2_5"
"""What chat() of every release that was converted uses."""
TEXT_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""`text_config.model_type` -> the class our families are named after."""


def original_config(source: Mapping, processor: Mapping, where: str) -> dict:
    """The `internvl_chat` config.json that means the same as an `-hf` one.

    processor: preprocessor_config.json, which holds the tiling limits, or an empty dict. Raises UnsupportedCheckpoint
    for a language model that no InternVL we run has, and for what the original cannot say.
    """
    text, tower = source.get("text_config") or {}, source.get("vision_config") or {}
    kind = text.get("model_type")
    if kind not in TEXT_CLASSES:
        raise UnsupportedCheckpoint(
            f"{where}: language model {kind!r} is not supported; take a model with one of {', '.join(TEXT_CLASSES)}"
        )
    if source.get("vision_feature_select_strategy", "default") != "default":
        raise UnsupportedCheckpoint(f"{where}: its features keep the class token; take a published InternVL checkpoint")
    tied = text.get("tie_word_embeddings", source.get("tie_word_embeddings", False))
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": TEMPLATE,
        "force_image_size": _side(tower.get("image_size", 448)),
        "downsample_ratio": source.get("downsample_ratio", 0.5),
        "ps_version": "v2",
        "select_layer": source.get("vision_feature_layer", -1),
        "dynamic_image_size": True,
        "use_thumbnail": processor.get("use_thumbnail", True),
        "min_dynamic_patch": processor.get("min_patches", 1),
        "max_dynamic_patch": processor.get("max_patches", 12),
        "torch_dtype": source.get("dtype") or source.get("torch_dtype"),
        "llm_config": {**text, "architectures": [TEXT_CLASSES[kind]], "tie_word_embeddings": tied},
        "vision_config": _tower(tower),
    }


def _tower(tower: Mapping) -> dict:
    """The original's names; what is silent has the defaults of transformers' InternVLVisionConfig."""
    return {
        **tower,
        "model_type": "intern_vit_6b",
        "image_size": _side(tower.get("image_size", 448)),
        "patch_size": _side(tower.get("patch_size", 14)),
        "qkv_bias": tower.get("attention_bias", False),
        "qk_normalization": tower.get("use_qk_norm", False),
        "norm_type": tower.get("norm_type", "layer_norm"),
        "layer_norm_eps": tower.get("layer_norm_eps", 1e-6),
        "hidden_act": tower.get("hidden_act", "gelu"),
    }


def _side(size: int | list[int]) -> int:
    return size[0] if isinstance(size, list) else size
