"""The demo model's config.json: InternVL2_5-8B's layout, in small."""


def demo_config(vocab_size: int) -> dict:
    """config.json of the demo model with `vocab_size` tokens."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internvl2_5",
        "force_image_size": 112,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": "bfloat16",
        "llm_config": language_config(vocab_size),
        "vision_config": vision_config(),
    }


def language_config(vocab_size: int) -> dict:
    """An InternLM2 of four layers with grouped queries and a fused wqkv."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        # Short contexts: a smaller base than the 8B's 1e6 keeps neighbouring tokens apart.
        "rope_theta": 10000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rms_norm_eps": 1e-05,
        "bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def vision_config() -> dict:
    """An InternViT in the 300M's style, of four layers."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 112,
        "patch_size": 14,
        "num_channels": 3,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-06,
        "qkv_bias": True,
        "qk_normalization": False,
        "hidden_act": "gelu",
        "drop_path_rate": 0.0,
        "torch_dtype": "bfloat16",
    }
