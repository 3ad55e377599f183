"""How much memory a model takes while it answers: pure arithmetic over shapes. Reads nothing and runs nothing.

Everything that is known about the runtime and not about the model is data in the first half of this file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from vlquant.config import ModelConfig
from vlquant.decoder import LINEARS
from vlquant.decoder_config import DecoderConfig
from vlquant.rope import rope_depends_on_length
from vlquant.layout import EMBEDDING, HEAD, Shapes, language_shapes, layer_shapes, projector_shapes, vision_shapes
from vlquant.runtime.native import BLOCK
from vlquant.runtime.native_decoder import CHUNK, HEAD_DIM_MULTIPLE
from vlquant.runtime.prefill import TOKENS_AT_A_TIME
from vlquant.vision import VisionConfig


@dataclass(frozen=True)
class Form:
    """How the running model holds a weight matrix."""

    bits: int
    """Of one weight."""
    group_size: int | None = None
    """Consecutive weights of a row that share a scale; -1: the whole row; None: there are no scales."""
    group_bytes: int = 0
    """Scale of one group, with all that belongs to it."""
    in_order: bool = True
    """Whether a group's columns follow each other; otherwise the place of each is held too."""

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix [rows, columns]."""
        groups = 0 if self.group_size is None else 1 if self.group_size == -1 else math.ceil(columns / self.group_size)
        order = 0 if self.in_order else 8 * columns
        return math.ceil(rows * columns * self.bits / 8) + rows * groups * self.group_bytes + order


HALF, SINGLE = Form(16), Form(32)
FORMS = {
    "GPTQ-4": Form(4, 128, 2),  # symmetric: no zeros are kept
    "GPTQ-8": Form(8, 128, 2),
    "NF4": Form(4, 64, 4),  # the runtime keeps block maxima in float32, not in 8 bits as the file does
    "int8": Form(8, -1, 4),
}
"""What the linears of the language model become, by method, as `vlquant.runtime.linear` holds them."""
SCALE, SCALE_AND_ZERO = 2, 6
"""Bytes of a group of GPTQ: a half, and, where zeros are not all in the middle, an offset in float32."""
ROUNDED_HEAD = Form(8, -1, 2)
"""What `vlquant.runtime.native.round_rows` makes of a head."""

VISION_FORMS = {"fp32": SINGLE, "fp16": HALF, "int8": Form(8, -1, 4)}
"""Matrices of the exported vision tower, by precision; what is no matrix is float32, or float16 in fp16."""


@dataclass(frozen=True)
class Place:
    """What the runtime adds to the weights of a model on one kind of device."""

    visions: tuple[str, ...]
    """Precisions the exported tower can run in there."""
    cache_value: int
    """Bytes of one number in the key-value cache."""
    activation_value: int
    """Bytes of one number of a hidden state."""
    expanded_value: int
    """Bytes of one weight of a linear that is expanded to be multiplied with."""
    expanded_weights: int | None
    """How many are expanded at a time; None: a whole linear."""
    expands_head: bool
    """Whether the head is multiplied with in this way too."""
    keeps_freed: bool
    """Whether what the attention has freed stays with the process while the MLP gets new memory."""
    libraries: int
    """Bytes that Python, torch and ONNX Runtime, or a CUDA context and its libraries, take with nothing loaded."""
    loading: int
    """Bytes that loading frees without the process giving them back: what is computed with later takes these first."""
    embedding: Form | None = None
    """None: in the precision of the checkpoint."""
    head: Form | None = None
    """None: in the precision of the checkpoint."""
    chunk: int | None = None
    """Tokens of a prompt that go through all layers together; None: all of them."""
    chunk_of_any_rope: bool = False
    """Whether also those whose rope depends on how long the prompt is."""
    kept_states: int = 0
    """Hidden states of the whole prompt that exist beside a chunk's: its embeddings, and what results are collected in."""
    masks_chunks: bool = False
    """Whether all chunks but the first attend through a mask, to keys and values that are widened for it."""
    three_bits: int = 8
    """Bits that a weight of three takes."""
    row_scale: int = 4
    """Bytes of the scale of one row of int8."""
    tower_at_once: bool = False
    """Whether the vision tower is loaded with the model, not by the first picture."""


PLACES = {
    # Measured with InternVL2_5-1B (tests/RESULTS.md). ONNX Runtime has no float16 matmul on a CPU.
    "cpu": Place(
        visions=("fp32", "int8"), cache_value=4, activation_value=4, expanded_value=4, expanded_weights=16 * 2**20,
        expands_head=True, keeps_freed=True, libraries=270_000_000, loading=130_000_000,
    ),
    # On paper, nothing of it measured: 0.8 GB is what context, cuBLAS, cuDNN and ONNX Runtime's arena are expected to take.
    # ONNX Runtime has no dynamic quantization on CUDA: an int8 tower would run on the CPU.
    "cuda": Place(
        visions=("fp32", "fp16"), cache_value=2, activation_value=4, expanded_value=2, expanded_weights=None,
        expands_head=False, keeps_freed=False, libraries=800_000_000, loading=0, chunk=TOKENS_AT_A_TIME["cuda"],
        kept_states=2, masks_chunks=True, three_bits=4, row_scale=6, tower_at_once=True,
    ),
}  # fmt: skip

COMPILED = replace(
    PLACES["cpu"], expanded_value=0, expands_head=False, keeps_freed=False, loading=0, embedding=Form(0), head=ROUNDED_HEAD,
    chunk=CHUNK, chunk_of_any_rope=True, kept_states=4, row_scale=2,
)  # fmt: skip
"""A CPU whose compiled kernels know all linears: nothing is expanded, weights are mapped, rows of the embedding read from the file."""
TEXT_TOKENS = 512
"""Left for system message, question and answer beside the tiles."""
PIXEL_COPIES = 3
"""While a picture's tiles are normalized they exist this often, in float32."""
FEATURE_COPIES = 2
"""Visual tokens are kept for the next turn, and once more in the order of the conversation."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a running model, by what they are for."""

    linears: int
    """Of the language model, with their biases and its norms."""
    embedding: int
    head: int
    """0 where it is the embedding."""
    vision: int
    """Tower and projector; 0 where a text needs none."""
    cache: int
    """Keys and values of the whole context."""
    work: int
    """Activations, and the scratch they are computed with."""
    libraries: int
    """The process, or a CUDA context, with nothing loaded: an estimate."""

    @property
    def total(self) -> int:
        return self.linears + self.embedding + self.head + self.vision + self.cache + self.work + self.libraries


@dataclass(frozen=True)
class Weights:
    """What is to be known of a model's weights beside its shapes."""

    config: ModelConfig
    linears: Mapping[str, Form]
    """The form of every linear of the decoder, by the name of its weight."""
    embedding: Form = HALF
    head: Form = HALF
    head_bits: int = 8
    """In which a CPU's compiled kernels are to compute the head: 8, or 16 as it is stored."""
    in_bundle: bool = True
    """Whether what the compiled kernels read is kept in a file and mapped; of what others quantized it is made at every load."""


def model_memory(weights: Weights, place: Place, *, vision: str, context: int, tiles: int) -> Memory:
    """Memory of a model that answers about `tiles` tiles in a conversation that fills `context` tokens.

    place: as `running_place` has it; vision: a key of VISION_FORMS.
    """
    config = weights.config
    shapes = language_shapes(config.decoder)
    embedding, head = place.embedding or weights.embedding, place.head or weights.head
    has_head = HEAD in shapes or place.embedding is not None or place.head is not None  # Such a tied one is held by itself.
    return Memory(
        linears=linears_bytes(shapes, {name: form_in(place, form) for name, form in weights.linears.items()}),
        embedding=embedding.matrix_bytes(*shapes[EMBEDDING]),
        head=head.matrix_bytes(*shapes[EMBEDDING]) if has_head else 0,
        vision=vision_bytes(config, vision) if tiles or place.tower_at_once else 0,
        cache=cache_bytes(config.decoder, place, context),
        work=work_bytes(config, place, context=context, tiles=tiles),
        libraries=place.libraries,
    )


def running_place(place: Place, weights: Weights, *, kernels: bool = True) -> Place:
    """What a place is for a model, as `vlquant.runtime.loading` decides it.

    kernels: whether a CPU's compiled kernels are there. They take over the head of a quantized model, and all of it if they
    know every linear.
    """
    forms = set(weights.linears.values())
    packed = any(form.group_size is not None and form != FORMS["NF4"] for form in forms)
    if place is not PLACES["cpu"] or not kernels or not packed:
        return place
    shapes = language_shapes(weights.config.decoder)
    whole_blocks = all(shapes[name][1] % BLOCK == 0 for name in weights.linears)
    knows_all = all(map(kernels_know, forms)) and whole_blocks and weights.config.decoder.head_dim % HEAD_DIM_MULTIPLE == 0
    compiled = COMPILED if weights.in_bundle else replace(COMPILED, loading=place.loading)
    if knows_all and weights.head_bits == 8:
        return compiled
    if knows_all:  # The head alone is expanded.
        return replace(compiled, head=None, expands_head=True, expanded_value=place.expanded_value)
    return replace(place, head=ROUNDED_HEAD, expands_head=False) if weights.head_bits == 8 else place


def kernels_know(form: Form) -> bool:
    """Whether the compiled kernels multiply with such a matrix: what `vlquant.runtime.native.pack_linear` takes."""
    if form == FORMS["int8"]:
        return True
    whole_blocks = form.group_size is not None and (form.group_size == -1 or form.group_size % BLOCK == 0)
    return form.bits in (4, 8) and form.group_bytes == SCALE and form.in_order and whole_blocks


def form_in(place: Place, form: Form) -> Form:
    """How a place holds what is stored in a form."""
    if form == FORMS["int8"]:
        return replace(form, group_bytes=place.row_scale)
    return replace(form, bits=place.three_bits) if form.bits == 3 else form


def linear_names(shapes: Shapes) -> Iterator[str]:
    """The names among `shapes` that are weights of the decoder's linears."""
    endings = tuple(f".{linear}.weight" for linear in LINEARS)
    return (name for name in shapes if name.endswith(endings))


def linears_bytes(shapes: Shapes, forms: Mapping[str, Form]) -> int:
    """All of a language model but embedding and head; norms and biases are held in float32."""
    rest = (name for name in shapes if name not in (EMBEDDING, HEAD))
    return sum(forms[name].matrix_bytes(*shapes[name]) if name in forms else 4 * math.prod(shapes[name]) for name in rest)


def vision_bytes(config: ModelConfig, precision: str) -> int:
    """Tower (the layers that run) and projector as they are exported."""
    tower = replace(config.vision, layers=config.vision.layers_to_run)
    form = VISION_FORMS[precision]
    value = 2 if form == HALF else 4
    total = 0
    for name, shape in (vision_shapes(tower) | projector_shapes(config)).items():
        is_matrix = name.endswith(".weight") and len(shape) > 1
        total += form.matrix_bytes(shape[0], math.prod(shape[1:])) if is_matrix else value * math.prod(shape)
    return total


def cache_bytes(config: DecoderConfig, place: Place, context: int) -> int:
    """Keys and values of `context` tokens in every layer."""
    return 2 * config.layers * config.key_value_heads * config.head_dim * context * place.cache_value


def work_bytes(config: ModelConfig, place: Place, *, context: int, tiles: int) -> int:
    """What is computed with at the worst moment: a prompt that fills the context, or pictures becoming visual tokens."""
    decoder = config.decoder
    expanded = max(math.prod(shape) for shape in layer_shapes(decoder, 0).values())
    expanded = max(expanded, decoder.vocab_size * decoder.hidden_size) if place.expands_head else expanded
    expanded = min(expanded, place.expanded_weights or expanded)
    pixels = PIXEL_COPIES * 4 * tiles * 3 * config.vision.image_size**2
    features = FEATURE_COPIES * 4 * tiles * config.chat.tokens_per_tile * decoder.hidden_size
    prefill = features + prompt_bytes(decoder, place, context)
    tower = tower_bytes(config.vision, place) if tiles else 0
    return place.expanded_value * expanded + tower + max(pixels, prefill, place.loading)


def prompt_bytes(config: DecoderConfig, place: Place, context: int) -> int:
    """What a prompt of `context` tokens is computed with, all at once or chunk by chunk."""
    in_chunks = place.chunk is not None and (place.chunk_of_any_rope or not rope_depends_on_length(config, context))
    at_once = min(context, place.chunk) if in_chunks else context
    total = at_once * prompt_values(config, place) * place.activation_value
    if in_chunks:  # With rotations.
        total += context * (place.kept_states * config.hidden_size + 4 * config.head_dim) * place.activation_value
    if place.masks_chunks and at_once < context:
        # Each query head of a group sees the keys through a mask of its own, as truth values and as numbers.
        masks = (1 + place.activation_value) * at_once * (config.heads // config.key_value_heads)
        total += context * (masks + 2 * config.key_value_heads * config.head_dim * place.activation_value)
    return total


def prompt_values(config: DecoderConfig, place: Place) -> int:
    """Numbers that exist at once for each token of a prompt while it runs through a layer.

    Four hidden states (what came in, two sums, the normed one), and beside them the attention's (queries, what rotates
    them, keys and values repeated for every query head), the MLP's (gate and up), or both.
    """
    queries, narrow = config.heads * config.head_dim, config.key_value_heads * config.head_dim
    parts = 7 * queries + 2 * narrow, 2 * config.intermediate_size
    return 4 * config.hidden_size + (sum(parts) if place.keeps_freed else max(parts))


def tower_bytes(config: VisionConfig, place: Place) -> int:
    """What the tower computes one tile with; ONNX Runtime's arena keeps it for the next."""
    tokens = config.patches_per_side**2 + 1
    return place.activation_value * tokens * (4 * config.hidden_size + 2 * config.intermediate_size + config.heads * tokens)
