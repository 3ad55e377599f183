"""Which tensors a model consists of, by canonical name and shape, float or quantized. Reads nothing."""

from vlquant.config import ModelConfig
from vlquant.decoder import LINEARS, NORMS
from vlquant.decoder_config import DecoderConfig
from vlquant.family import LANGUAGE_MODEL
from vlquant.vision import VisionConfig

HEAD = "lm_head.weight"
EMBEDDING = LANGUAGE_MODEL + "embed_tokens.weight"
POSITIONS = "model.vision_tower.embeddings.position_embeddings"

QUANTIZED_FORMS = (
    (".qweight", ".qzeros", ".scales", ".g_idx"),
    (".weight", ".weight.absmax"),
    (".weight", ".SCB"),
)
"""What may stand for a linear's float `.weight`: GPTQ, bitsandbytes NF4, bitsandbytes int8."""

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Every tensor the float model needs, with its shape; a tied head is not among them."""
    return {**language_shapes(config.decoder), **vision_shapes(config.vision), **projector_shapes(config)}


def layer_shapes(config: DecoderConfig, index: int) -> Shapes:
    """The tensors of one decoder layer."""
    heads, narrow = config.heads * config.head_dim, config.key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = [(heads, hidden), (narrow, hidden), (narrow, hidden), (hidden, heads), (inner, hidden), (inner, hidden), (hidden, inner)]
    shapes = {f"{name}.weight": size for name, size in zip(LINEARS, sizes, strict=True)}
    shapes |= {f"{name}.weight": (hidden,) for name in NORMS}
    if config.query_key_value_bias:
        shapes |= {f"self_attn.{name}.bias": (rows,) for name, rows in zip(("q_proj", "k_proj", "v_proj"), (heads, narrow, narrow))}
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.query_key_norm:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return {layer_prefix(index) + name: shape for name, shape in shapes.items()}


def layer_prefix(index: int) -> str:
    """What the canonical names of decoder layer `index` start with."""
    return f"{LANGUAGE_MODEL}layers.{index}."


def language_shapes(config: DecoderConfig) -> Shapes:
    """Embedding, layers, final norm and (unless tied) head of the language model."""
    shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for index in range(config.layers):
        shapes |= layer_shapes(config, index)
    shapes[LANGUAGE_MODEL + "norm.weight"] = (config.hidden_size,)
    return shapes if config.tied_head else {**shapes, HEAD: (config.vocab_size, config.hidden_size)}


def vision_shapes(config: VisionConfig) -> Shapes:
    """The tensors of the vision tower."""
    hidden, patch = config.hidden_size, config.patch_size
    prefix = "model.vision_tower.embeddings."
    shapes = {
        prefix + "cls_token": (1, 1, hidden),
        prefix + "patch_embeddings.projection.weight": (hidden, 3, patch, patch),
        prefix + "patch_embeddings.projection.bias": (hidden,),
        POSITIONS: (1, config.patches_per_side**2 + 1, hidden),
    }
    for index in range(config.layers):
        layer = f"model.vision_tower.encoder.layer.{index}."
        shapes |= {layer + name: shape for name, shape in _vision_layer(config).items()}
    return shapes


def _vision_layer(config: VisionConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {"lambda_1": (hidden,), "lambda_2": (hidden,)}
    for name in ("q_proj", "k_proj", "v_proj"):
        shapes[f"attention.{name}.weight"] = (hidden, hidden)
        if config.query_key_value_bias:
            shapes[f"attention.{name}.bias"] = (hidden,)
    if config.query_key_norm:
        shapes |= {f"attention.{name}.weight": (hidden,) for name in ("q_norm", "k_norm")}
    for name, rows, columns in (
        ("attention.projection_layer", hidden, hidden),
        ("mlp.fc1", inner, hidden),
        ("mlp.fc2", hidden, inner),
    ):
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in ("layernorm_before", "layernorm_after"):
        shapes[f"{name}.weight"] = (hidden,)
        if config.norm == "layer_norm":
            shapes[f"{name}.bias"] = (hidden,)
    return shapes


def projector_shapes(config: ModelConfig) -> Shapes:
    """The tensors between vision tower and language model."""
    wide, hidden = int(config.vision.hidden_size / config.vision.downsample_ratio**2), config.decoder.hidden_size
    prefix = "model.multi_modal_projector."
    return {
        prefix + "layer_norm.weight": (wide,),
        prefix + "layer_norm.bias": (wide,),
        prefix + "linear_1.weight": (hidden, wide),
        prefix + "linear_1.bias": (hidden,),
        prefix + "linear_2.weight": (hidden, hidden),
        prefix + "linear_2.bias": (hidden,),
    }
