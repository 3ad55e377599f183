"""The files beside the weights that make a bundle a standard `-hf` checkpoint: configuration, processor, chat template.

Settings in, JSON and Jinja out; reads no weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from vlquant.bundle import StageNoise
from vlquant.config import ChatConfig, ModelConfig
from vlquant.decoder import LINEARS
from vlquant.decoder_config import DecoderConfig
from vlquant.rope import long_rope_scale
from vlquant.family import LANGUAGE_MODEL
from vlquant.hf_config import TEXT_CLASSES
from vlquant.prompt import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, Template
from vlquant.recipe import Recipe
from vlquant.tiling import MEAN, STANDARD_DEVIATION
from vlquant.tokenizer import Tokenizer
from vlquant.vision import VisionConfig

STAGES = (LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:])
"""Linears that read the same input, in the order of computation; fused kernels want them quantized alike."""

KEEP_FLOAT = ("model.vision_tower", "model.multi_modal_projector", "vision_tower", "multi_modal_projector", "lm_head")
"""What readers of bitsandbytes checkpoints must leave alone, under the names each of them compares."""

VIDEO = "<video>"
"""What InternVLProcessor expands to numbered frames."""


def inexpressible(config: ModelConfig) -> str | None:
    """Why transformers' InternVL cannot compute this model; None: it can."""
    vision = config.vision
    if vision.pixel_shuffle != "v2":
        return f"it orders picture tokens by pixel shuffle {vision.pixel_shuffle}, and the -hf layout knows only v2"
    if vision.select_layer not in (-1, vision.layers):
        return f"it takes features from vision layer {vision.select_layer}, and the -hf layout only from the last"
    return None


def model_config(config: ModelConfig, tokenizer: Tokenizer, *, quantization: dict, dtype: str) -> dict:
    """config.json of InternVLForConditionalGeneration.

    quantization: from `quantization_config`; dtype: that of the float tensors, such as "bfloat16".
    """
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "torch_dtype": dtype,
        "text_config": text_config(config, tokenizer, dtype),
        "vision_config": vision_config(config.vision, dtype),
        "image_token_id": tokenizer.token_id(IMAGE_CONTEXT),
        "image_seq_length": config.chat.tokens_per_tile,
        "downsample_ratio": config.vision.downsample_ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        # The class's default is True, which would drop the head of every untied model.
        "tie_word_embeddings": config.decoder.tied_head,
        "quantization_config": quantization,
    }


def text_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict:
    """The language model as transformers' class of the family's text_model_type."""
    decoder = config.decoder
    fields = {
        "model_type": config.family.text_model_type,
        "architectures": [TEXT_CLASSES[config.family.text_model_type]],
        "torch_dtype": dtype,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.key_value_heads,
        "head_dim": decoder.head_dim,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_positions,
        "rms_norm_eps": decoder.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": decoder.tied_head,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": next(iter(tokenizer.encode("")), None),
        "eos_token_id": tokenizer.token_id(config.chat.conversation.stop_token),
        "pad_token_id": tokenizer.pad_id,
        **_rope(decoder),
    }
    if config.family.text_model_type in ("llama", "qwen3"):
        fields |= {"attention_bias": decoder.output_bias, "mlp_bias": False}
    if config.family.text_model_type in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": False}
    return fields


def _rope(decoder: DecoderConfig) -> dict:
    """Both spellings: transformers 4 reads rope_theta and rope_scaling, 5 makes rope_parameters of them."""
    rope, scaling = decoder.rope, None
    if rope.dynamic_factor is not None:
        scaling = {"rope_type": "dynamic", "factor": rope.dynamic_factor}
    if rope.long is None:
        return {"rope_theta": rope.theta, "rope_scaling": scaling}
    reach = rope.long.short_reach
    scaling = {
        "rope_type": "longrope",
        "short_factor": list(rope.long.short_factors),
        "long_factor": list(rope.long.long_factors),
        "factor": decoder.max_positions / reach,
        "attention_factor": long_rope_scale(rope.long, decoder.max_positions),
        "original_max_position_embeddings": reach,
    }
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "original_max_position_embeddings": reach}


def vision_config(vision: VisionConfig, dtype: str) -> dict:
    """InternViT as transformers' internvl_vision."""
    return {
        "model_type": "internvl_vision",
        "architectures": ["InternVLVisionModel"],
        "torch_dtype": dtype,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "attention_bias": vision.query_key_value_bias,
        "use_qk_norm": vision.query_key_norm,
        "norm_type": vision.norm,
        "layer_norm_eps": vision.norm_eps,
        "image_size": [vision.image_size, vision.image_size],
        "patch_size": [vision.patch_size, vision.patch_size],
        "num_channels": 3,
        "hidden_act": "gelu",
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    }


def quantization_config(recipe: Recipe, dtype: str, chosen: Sequence[StageNoise] = ()) -> dict:
    """What tells other programs how the linears are stored; `chosen`: stages with bits of their own."""
    return gptq_config(recipe, chosen) if recipe.packed_as_gptq else bitsandbytes_config(recipe, dtype)


def gptq_config(recipe: Recipe, chosen: Sequence[StageNoise] = ()) -> dict:
    """As GPTQModel writes it, with the older names of two fields that transformers, vLLM and LMDeploy read."""
    exceptions = bit_exceptions(recipe, chosen)
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "desc_act": False,
        "sym": True,
        "static_groups": True,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        # Without the leading "model." transformers loads random weights and says so only in a report.
        "block_name_to_quantize": LANGUAGE_MODEL + "layers",
        "modules_in_block_to_quantize": [list(stage) for stage in STAGES],
        "modules_to_not_convert": list(KEEP_FLOAT),
        **({"damp_percent": recipe.damping} if recipe.method == "gptq" else {}),
        **({"dynamic": exceptions} if exceptions else {}),
    }


def bit_exceptions(recipe: Recipe, chosen: Sequence[StageNoise]) -> dict[str, dict]:
    """Linears with other bits than the recipe's, as GPTQModel and vLLM look them up: by regular expressions of module names.

    vLLM asks for the fused linears it makes of a stage, GPTQModel for the single ones.
    """
    found = {}
    for stage in STAGES:
        block, names = stage[0].split(".")[0], [name.split(".")[1].removesuffix("_proj") for name in stage]
        names += ["".join(names) if block == "self_attn" else "_".join(names)] if len(names) > 1 else []
        for bits in {each.bits for each in chosen} - {recipe.bits}:
            layers = [str(each.layer) for each in chosen if each.linears == stage and each.bits == bits]
            if layers:
                found[rf"+:.*\.layers\.({'|'.join(layers)})\.{block}\.({'|'.join(names)})_proj$"] = {"bits": bits}
    return found


def bitsandbytes_config(recipe: Recipe, dtype: str) -> dict:
    """As transformers' BitsAndBytesConfig writes it. The list replaces its own, so the head is in it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": recipe.bits == 4,
        "load_in_8bit": recipe.bits == 8,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": list(KEEP_FLOAT),
    }


def chat_template(chat: ChatConfig, bos: str) -> str:
    """A Jinja template that writes conversations as `vlquant.prompt` does.

    Pictures become `<IMG_CONTEXT>`, videos `<video>`, which InternVLProcessor expands; several pictures of one message are
    numbered. bos: the text of the token that the original tokenizer puts first, or "". Readers add none to a template's text.
    """
    template = chat.conversation
    system = template.system_message if chat.system_message is None else chat.system_message
    return (
        f"{{{{- {_quoted(bos + template.system_prefix)} }}}}"
        "{%- if messages and messages[0]['role'] == 'system' %}"
        f"{{{{- {_TEXT_OF_SYSTEM} }}}}{{%- set turns = messages[1:] %}}"
        f"{{%- else %}}{{{{- {_quoted(system)} }}}}{{%- set turns = messages %}}{{%- endif %}}"
        f"{{{{- {_quoted(template.separator)} }}}}"
        "{%- for message in turns %}"
        f"{{{{- {_quoted(template.assistant + template.text_lead)} if message['role'] == 'assistant'"
        f" else {_quoted(template.user + template.text_lead)} }}}}"
        f"{_CONTENT}"
        f"{{{{- {_quoted(_answer_separator(template))} if message['role'] == 'assistant'"
        f" else {_quoted(template.separator)} }}}}"
        "{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- {_quoted(template.assistant)} }}}}{{%- endif %}}"
    )


_TEXT_OF_SYSTEM = (
    "messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'] | map(attribute='text') | join"
)
_CONTENT = (
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}"
    "{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
    "{%- set seen = namespace(pictures=0) %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{%- set seen.pictures = seen.pictures + 1 %}"
    "{{- 'Image-' ~ seen.pictures ~ ': ' if pictures > 1 else '' }}{{- '<IMG_CONTEXT>\\n' }}"
    "{%- elif part['type'] == 'video' %}{{- '<video>\\n' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
)


def _answer_separator(template: Template) -> str:
    return template.separator if template.answer_separator is None else template.answer_separator


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)


def processor_files(chat: ChatConfig) -> dict[str, dict]:
    """What InternVLProcessor and its picture and video processors read, by file name."""
    pixels = {
        "size": {"height": chat.image_size, "width": chat.image_size},
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STANDARD_DEVIATION),
        "processor_class": "InternVLProcessor",
    }
    tiles = {"crop_to_patches": chat.max_tiles > 1, "min_patches": chat.min_tiles, "max_patches": chat.max_tiles}
    return {
        "preprocessor_config.json": {"image_processor_type": "GotOcr2ImageProcessor", **pixels, **tiles},
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", **pixels},
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": chat.tokens_per_tile},
    }


def write_settings(folder: Path, config: ModelConfig, tokenizer: Tokenizer, *, quantization: dict, dtype: str) -> None:
    """Write every settings file of a bundle but the tokenizer's own into `folder`, and complete the tokenizer's.

    A model that the -hf layout cannot express keeps the original's config.json, so that no other program takes it for one.
    """
    stop = tokenizer.token_id(config.chat.conversation.stop_token)
    # chat() of the original stops at this token alone and decodes greedily unless told otherwise.
    files = {"generation_config.json": {"do_sample": False, "eos_token_id": stop, "pad_token_id": tokenizer.pad_id}}
    if quantization["quant_method"] == "gptq":
        files["quantize_config.json"] = quantization
    if inexpressible(config):
        files["config.json"] = {**config.source, "quantization_config": quantization}
    else:
        own = model_config(config, tokenizer, quantization=quantization, dtype=dtype)
        files |= {"config.json": own, **processor_files(config.chat)}
        bos = tokenizer.decode(tokenizer.encode(""), skip_special=False).strip()
        (folder / "chat_template.jinja").write_text(chat_template(config.chat, bos), encoding="utf-8")
        _name_picture_tokens(folder / "tokenizer_config.json")
    for name, contents in files.items():
        write_json(folder / name, contents)


def _name_picture_tokens(path: Path) -> None:
    """Tell InternVLProcessor, through the tokenizer's settings, which tokens stand for pictures."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("chat_template", None)  # chat_template.jinja is ours
    settings["processor_class"] = "InternVLProcessor"
    settings["extra_special_tokens"] = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_CONTEXT,
        "video_token": VIDEO,
    }
    write_json(path, settings)


def write_json(path: Path, contents: dict) -> None:
    """Write JSON that reads well and is the same for the same contents."""
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
