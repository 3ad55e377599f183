"""config.json of a checkpoint of either layout (or the copy inside a bundle) to typed settings. Reads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlquant import hf_config
from vlquant.checkpoint import read_json
from vlquant.decoder_config import DecoderConfig, LongRope, Rope
from vlquant.errors import BrokenCheckpoint, InvalidRequest, UnsupportedCheckpoint
from vlquant.family import FAMILIES, LanguageFamily
from vlquant.prompt import IMAGE_CONTEXT, PROMPT_FORMS, Template, find_template, processor_form
from vlquant.vision import VisionConfig

CONFIG_FILE = "config.json"
MANIFEST_FILE = "vlquant.json"

# What the original's configuration classes take where config.json is silent.
DEFAULT_MAX_TILES = 6
DEFAULT_ROPE_THETA = 10_000.0
PLAIN_ROPES = (None, "default")
LONG_ROPES = ("su", "longrope")
"""Older and newer name of the same."""


@dataclass(frozen=True)
class ChatConfig:
    """How pictures and conversations become model input."""

    template: str
    system_message: str | None
    """None: the template's own."""
    image_size: int
    """Tile side in pixels."""
    tokens_per_tile: int
    min_tiles: int = 1
    max_tiles: int = 12
    """Per picture, without the thumbnail."""
    use_thumbnail: bool = True
    image_token: str = IMAGE_CONTEXT
    prompt_form: str = "original"
    """One of PROMPT_FORMS."""

    @property
    def conversation(self) -> Template:
        """How conversations are written."""
        template = find_template(self.template)
        return processor_form(template) if self.prompt_form == "hf" else template


@dataclass(frozen=True)
class ModelConfig:
    """Everything config.json says that a runtime needs."""

    family: LanguageFamily
    decoder: DecoderConfig
    vision: VisionConfig
    chat: ChatConfig
    source: dict
    """config.json in the original's words, without `auto_map`."""


def read_config(folder: str | Path) -> ModelConfig:
    """Settings of the checkpoint or bundle in `folder`.

    Raises BrokenCheckpoint or UnsupportedCheckpoint, naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BrokenCheckpoint(f"{folder} is not a folder; give the folder of an InternVL checkpoint or bundle")
    if (folder / MANIFEST_FILE).exists():
        where = f"{folder / MANIFEST_FILE} source_config"
        return parse_config(_section(read_json(folder / MANIFEST_FILE), "source_config", str(folder)), where)
    if not (folder / CONFIG_FILE).exists():
        raise BrokenCheckpoint(f"{folder} has no {CONFIG_FILE}; give the folder of an InternVL checkpoint or bundle")
    source, where = read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE)
    if source.get("model_type") == hf_config.MODEL_TYPE:
        source = hf_config.original_config(source, _processor(folder), where)
    return parse_config(source, where)


def quantization_settings(folder: Path) -> dict:
    """How the checkpoint in `folder` is quantized, as its config.json says in the model's or the language model's section."""
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    sections = [config, *(config.get(key) for key in ("llm_config", "text_config"))]
    found = [section["quantization_config"] for section in sections if isinstance(section, dict) and section.get("quantization_config")]
    return found[0] if found and isinstance(found[0], dict) else {}


def _processor(folder: Path) -> Mapping:
    """Settings of an `-hf` checkpoint's image processor, which newer files nest in the processor's."""
    if (folder / "preprocessor_config.json").exists():
        return read_json(folder / "preprocessor_config.json")
    path = folder / "processor_config.json"
    return (read_json(path).get("image_processor") or {}) if path.exists() else {}


def with_prompt_form(config: ModelConfig, form: str) -> ModelConfig:
    """The same settings with conversations written in `form`, one of PROMPT_FORMS; raises InvalidRequest for another."""
    if form not in PROMPT_FORMS:
        raise InvalidRequest(f"prompt form {form!r} is unknown; use {' or '.join(PROMPT_FORMS)}")
    if form == "original":
        return config
    processor_form(config.chat.conversation)  # Raises for models that the processor does not know.
    # A system message of the checkpoint's is no part of the processor's form, one of the caller's is.
    return replace(config, chat=replace(config.chat, prompt_form=form, system_message=None))


def parse_config(source: dict, where: str) -> ModelConfig:
    """Settings from the contents of an `internvl_chat` config.json; `where` names it in errors.

    Raises UnsupportedCheckpoint for another kind of model, BrokenCheckpoint for missing values.
    """
    model_type = source.get("model_type")
    if model_type != "internvl_chat":
        raise UnsupportedCheckpoint(
            f"{where}: model_type {model_type!r} is no InternVL checkpoint ('internvl_chat' or 'internvl'); give an InternVL folder"
        )
    language = _section(source, "llm_config", where)
    family = _family(language, where)
    language = {**family.defaults, **language}
    try:
        vision = _vision(source, where)
        return _model_config(source, language, family, vision, where)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BrokenCheckpoint(f"{where} holds a value of the wrong kind ({error}); download the original file again") from None


def _model_config(source: dict, language: Mapping, family: LanguageFamily, vision: VisionConfig, where: str) -> ModelConfig:
    return ModelConfig(
        family=family,
        decoder=_decoder(language, family, f"{where} llm_config"),
        vision=vision,
        chat=_chat(source, vision, where),
        source=_without_remote_code(source),
    )


def _family(language: Mapping, where: str) -> LanguageFamily:
    names = language.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else names
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UnsupportedCheckpoint(
            f"{where}: language model class {architecture!r} is not supported; "
            f"take a model with one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]


def _decoder(language: Mapping, family: LanguageFamily, where: str) -> DecoderConfig:
    _require_activation(language, "silu", where)
    heads = _count(language, "num_attention_heads", where)
    hidden_size = _count(language, "hidden_size", where)
    return DecoderConfig(
        hidden_size=hidden_size,
        layers=_count(language, "num_hidden_layers", where),
        heads=heads,
        key_value_heads=language.get("num_key_value_heads") or heads,
        head_dim=language.get("head_dim") or hidden_size // heads,
        intermediate_size=_count(language, "intermediate_size", where),
        vocab_size=_count(language, "vocab_size", where),
        norm_eps=float(language.get("rms_norm_eps", 1e-6)),
        rope=_rope(language, family, where),
        max_positions=_count(language, "max_position_embeddings", where),
        query_key_value_bias=_bias(family.query_key_value_bias, language),
        output_bias=_bias(family.output_bias, language),
        query_key_norm=family.query_key_norm,
        tied_head=bool(language.get("tie_word_embeddings", False)),
    )


def _bias(rule: bool | str, language: Mapping) -> bool:
    return bool(language.get(rule, False)) if isinstance(rule, str) else rule


def _rope(language: Mapping, family: LanguageFamily, where: str) -> Rope:
    """Older files carry rope_theta and rope_scaling, newer ones rope_parameters with both."""
    parameters = language.get("rope_parameters") or {}
    theta = float(language.get("rope_theta") or parameters.get("rope_theta") or DEFAULT_ROPE_THETA)
    scaling = language.get("rope_scaling") or parameters
    kind = scaling.get("type") or scaling.get("rope_type")
    if not family.honours_rope_scaling or kind in PLAIN_ROPES:
        return Rope(theta=theta)
    if kind == "dynamic":
        return Rope(theta=theta, dynamic_factor=float(_value(scaling, "factor", f"{where} rope_scaling")))
    if kind in LONG_ROPES:
        return Rope(theta=theta, long=_long_rope(language, scaling, where))
    raise UnsupportedCheckpoint(
        f"{where}: rope scaling {kind!r} is not supported; take a model with plain, dynamic or {' or '.join(LONG_ROPES)} rope"
    )


def _long_rope(language: Mapping, scaling: Mapping, where: str) -> LongRope:
    lists = [scaling.get(key) for key in ("short_factor", "long_factor")]
    if not all(isinstance(each, list) and all(isinstance(factor, int | float) for factor in each) for each in lists):
        raise BrokenCheckpoint(f"{where} rope_scaling lacks its lists of factors; download the original file again")
    short, long = (tuple(map(float, each)) for each in lists)
    reach = "original_max_position_embeddings"
    return LongRope(short, long, _value(scaling if reach in scaling else language, reach, where))


def _vision(source: Mapping, where: str) -> VisionConfig:
    tower = _section(source, "vision_config", where)
    where = f"{where} vision_config"
    _require_activation(tower, "gelu", where)
    vision = VisionConfig(
        hidden_size=_count(tower, "hidden_size", where),
        layers=_count(tower, "num_hidden_layers", where),
        heads=_count(tower, "num_attention_heads", where),
        intermediate_size=_count(tower, "intermediate_size", where),
        patch_size=_count(tower, "patch_size", where),
        image_size=_count({"image_size": source.get("force_image_size") or tower.get("image_size")}, "image_size", where),
        # From here on the defaults of the original configuration classes.
        norm=tower.get("norm_type", "rms_norm"),
        norm_eps=float(tower.get("layer_norm_eps", 1e-6)),
        query_key_value_bias=bool(tower.get("qkv_bias", False)),
        query_key_norm=bool(tower.get("qk_normalization", True)),
        select_layer=source.get("select_layer", -1),
        pixel_shuffle=source.get("ps_version", "v1"),
        downsample_ratio=source.get("downsample_ratio", 0.5),
    )
    _require_sound(vision, where)
    return vision


def _require_sound(vision: VisionConfig, where: str) -> None:
    """Raise BrokenCheckpoint for settings that no vision tower can have."""
    wrong = {
        "norm_type": vision.norm not in ("layer_norm", "rms_norm"),
        "ps_version": vision.pixel_shuffle not in ("v1", "v2"),
        "num_attention_heads": vision.hidden_size % vision.heads != 0,
        "select_layer": not isinstance(vision.select_layer, int) or not 0 <= vision.layers_to_run <= vision.layers,
        "downsample_ratio": not 0 < vision.downsample_ratio <= 1,
        "image_size": vision.image_size % vision.patch_size != 0,
    }
    if any(wrong.values()):
        name = next(name for name in wrong if wrong[name])
        raise BrokenCheckpoint(f"{where} has an unusable {name}; download the original file again")


def _chat(source: Mapping, vision: VisionConfig, where: str) -> ChatConfig:
    dynamic = _flag(source, "dynamic_image_size", where)
    system = source.get("system_message")
    if not isinstance(system, str | None):
        raise BrokenCheckpoint(f"{where} has a system_message that is no text ({system!r}); download the original file again")
    limits = {key: source.get(key) or default for key, default in (("min_dynamic_patch", 1), ("max_dynamic_patch", DEFAULT_MAX_TILES))}
    return ChatConfig(
        template=find_template(source.get("template")).name,
        system_message=system,
        image_size=vision.image_size,
        tokens_per_tile=vision.tokens_per_tile,
        min_tiles=_count(limits, "min_dynamic_patch", where) if dynamic else 1,
        max_tiles=_count(limits, "max_dynamic_patch", where) if dynamic else 1,
        use_thumbnail=_flag(source, "use_thumbnail", where),
    )


def _without_remote_code(value):
    """A copy of nested dictionaries without `auto_map`, which would make other readers run Python from the folder."""
    if not isinstance(value, dict):
        return value
    return {key: _without_remote_code(inner) for key, inner in value.items() if key != "auto_map"}


def _require_activation(section: Mapping, expected: str, where: str) -> None:
    activation = section.get("hidden_act", expected)
    if activation != expected:
        raise UnsupportedCheckpoint(f"{where}: hidden_act {activation!r} is not supported; take a model with {expected!r}")


def _section(source: Mapping, key: str, where: str) -> dict:
    section = source.get(key)
    if not isinstance(section, dict):
        raise BrokenCheckpoint(f"{where} has no {key}; download the original file again")
    return section


def _value(section: Mapping, key: str, where: str):
    value = section.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BrokenCheckpoint(f"{where} has no usable {key} ({value!r}); download the original file again")
    return value


def _count(section: Mapping, key: str, where: str) -> int:
    value = _value(section, key, where)
    if value != int(value) or value < 1:
        raise BrokenCheckpoint(f"{where} has no usable {key} ({value!r}); download the original file again")
    return int(value)


def _flag(section: Mapping, key: str, where: str) -> bool:
    value = section.get(key, False)
    if not isinstance(value, bool):
        raise BrokenCheckpoint(f"{where} has no usable {key} ({value!r}); download the original file again")
    return value
