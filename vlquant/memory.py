"""How much memory a model takes while it answers: pure arithmetic over shapes. Reads nothing and runs nothing.

Everything that is known about the runtime and not about the model is data in the first half of this file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from vlquant.config import ModelConfig
from vlquant.decoder import LINEARS, DecoderConfig
from vlquant.layout import EMBEDDING, HEAD, Shapes, language_shapes, layer_shapes, projector_shapes, vision_shapes
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

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix [rows, columns]."""
        groups = 0 if self.group_size is None else 1 if self.group_size == -1 else math.ceil(columns / self.group_size)
        return math.ceil(rows * columns * self.bits / 8) + rows * groups * self.group_bytes


HALF, SINGLE = Form(16), Form(32)
FORMS = {
    "GPTQ-4": Form(4, 128, 2),  # symmetric: no zeros are kept
    "GPTQ-8": Form(8, 128, 2),
    "NF4": Form(4, 64, 4),  # the runtime keeps block maxima in float32, not in 8 bits as the file does
    "int8": Form(8, -1, 4),
}
"""What the linears of the language model become, by method, as `vlquant.runtime.linear` holds them."""
INT8_CAPABILITY = "7.5"
"""CUDA compute capability below which bitsandbytes refuses int8; a GTX 1080 Ti has 6.1."""

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


PLACES = {
    # Measured with InternVL2_5-1B (tests/RESULTS.md). ONNX Runtime has no float16 matmul on a CPU.
    "cpu": Place(
        visions=("fp32", "int8"), cache_value=4, activation_value=4, expanded_value=4, expanded_weights=16 * 2**20,
        expands_head=True, keeps_freed=True, libraries=270_000_000, loading=130_000_000,
    ),
    # On paper, nothing of it measured: 0.8 GB is what context, cuBLAS, cuDNN and ONNX Runtime's arena are expected to take.
    # ONNX Runtime has no dynamic quantization on CUDA: an int8 tower would run on the CPU.
    "cuda": Place(
        visions=("fp32", "fp16"), cache_value=2, activation_value=2, expanded_value=2, expanded_weights=None,
        expands_head=False, keeps_freed=False, libraries=800_000_000, loading=0,
    ),
}  # fmt: skip

COMPILED = replace(
    PLACES["cpu"], expanded_value=0, expands_head=False, keeps_freed=False, embedding=Form(0), head=Form(8, -1, 2), chunk=256
)
"""A CPU whose compiled kernels know all linears: nothing is expanded, rows of the embedding are read from the file. Not measured yet."""
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
    """Tower and projector."""
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


def model_memory(weights: Weights, place: Place, *, vision: str, context: int, tiles: int) -> Memory:
    """Memory of a model that answers about `tiles` tiles in a conversation that fills `context` tokens.

    vision: a key of VISION_FORMS.
    """
    config, place = weights.config, running_place(place, weights)
    shapes = language_shapes(config.decoder)
    embedding, head = place.embedding or weights.embedding, place.head or weights.head
    has_head = HEAD in shapes or place is COMPILED  # There a tied one is rounded, and held.
    return Memory(
        linears=linears_bytes(shapes, compiled_forms(weights.linears) if place is COMPILED else weights.linears),
        embedding=embedding.matrix_bytes(*shapes[EMBEDDING]),
        head=head.matrix_bytes(*shapes[EMBEDDING]) if has_head else 0,
        vision=vision_bytes(config, vision),
        cache=cache_bytes(config.decoder, place, context),
        work=work_bytes(config, place, context=context, tiles=tiles),
        libraries=place.libraries,
    )


def running_place(place: Place, weights: Weights) -> Place:
    """The same place, or its compiled kernels where they compute all linears: GPTQ's forms and int8 on a CPU."""
    known = all(form.group_bytes == 2 or form == FORMS["int8"] for form in weights.linears.values())
    return COMPILED if place is PLACES["cpu"] and known else place


def compiled_forms(linears: Mapping[str, Form]) -> dict[str, Form]:
    """Forms as the kernels hold them: scales of int8 are halves too."""
    return {name: replace(form, group_bytes=2) for name, form in linears.items()}


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
    at_once = min(context, place.chunk or context)
    whole = 4 * decoder.hidden_size + 4 * decoder.head_dim if place.chunk else 0  # Embeddings, results and rotations of a prompt.
    prefill = features + (at_once * prompt_values(decoder, place) + context * whole) * place.activation_value
    return place.expanded_value * expanded + tower_bytes(config.vision, place) + max(pixels, prefill, place.loading)


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
