"""`vlquant plan`: what a model would take in memory, by method and precision, and what fits; from configuration and headers alone."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vlquant.bundle import MANIFEST, read_manifest
from vlquant.config import ModelConfig, parse_config, quantization_settings
from vlquant.counting import counted
from vlquant.errors import BrokenCheckpoint, InvalidRecipe, InvalidRequest, MissingDependency, VlquantError
from vlquant.events import Event, Report, silent
from vlquant.hub_headers import fetch_headers
from vlquant.layout import EMBEDDING, HEAD, layer_shapes, language_shapes
from vlquant.machine import available_memory, physical_memory
from vlquant.members import KNOWN_MODELS, MEMBERS, member_config
from vlquant.memory import (
    FORMS,
    HALF,
    PLACES,
    TEXT_TOKENS,
    Form,
    Memory,
    SCALE,
    SCALE_AND_ZERO,
    Place,
    Weights,
    linear_names,
    model_memory,
    running_place,
)
from vlquant.model import HUB_OWNER, Model, is_quantized, open_model, resolve_model
from vlquant.recipe import Recipe
from vlquant.runtime.native import native_kernels
from vlquant.runtime.packed_weights import bits_of_head
from vlquant.runtime.reader import position_limit

RECIPES = {
    "GPTQ-4": Recipe("gptq", 4), "GPTQ-8": Recipe("gptq", 8), "NF4": Recipe("bnb", 4), "int8": Recipe("bnb", 8),
}  # fmt: skip
"""What makes each of memory.FORMS; rounding (rtn) is stored as GPTQ is."""
GPU_BYTES = 11 * 10**9
"""Of a GTX 1080 Ti, with 0.7 GB left to whatever draws the screen."""
CONTEXT = 8192
NO_KERNELS = "planned without compiled kernels: there are none here, or VLQUANT_KERNELS asks for torch; vlquant doctor says whether they are there"
UNITS = {"": 10**9, "GB": 10**9, "G": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


@dataclass(frozen=True)
class Choice:
    """One way to run the model."""

    method: str
    """A key of memory.FORMS, "float16" or "float32"; of a bundle its recipe."""
    vision: str
    """Precision of the exported tower."""
    memory: Memory
    """For the context and tiles that were asked for."""
    total: int
    """Bytes."""
    fits: bool
    largest_context: int | None
    """Tokens that fit with these tiles, as far as the model reads; None: not even the tiles and a question."""
    most_tiles: int | None
    """That fit in a context just large enough for them and a question; None: not even a question."""


@dataclass(frozen=True)
class Plan:
    """What fits where."""

    model: str
    device: str
    limit: int
    """Bytes there are."""
    context: int
    """Tokens of the conversation, tiles and answer included."""
    tiles: int
    tokens_per_tile: int
    position_limit: int
    """Tokens the model can read."""
    choices: tuple[Choice, ...]
    remarks: tuple[str, ...] = ()
    """What the numbers rest on, where that is not the headers of the model itself."""

    @property
    def fits(self) -> bool:
        """Whether anything does."""
        return any(choice.fits for choice in self.choices)


def plan(
    model: str | Path,
    *,
    device: str = "cuda",
    memory: int | None = None,
    context: int | None = None,
    tiles: int | None = None,
    report: Report = silent,
) -> Plan:
    """Memory of a model by method and vision precision, and the largest context and tile count that fit. Reads no weights.

    model: folder, published name or hub id; a bundle is planned as it is. device: "cpu", by the kernels that are here, or
    "cuda", which need not be; memory: bytes, None: of a GTX 1080 Ti, or what is free here. context, tiles: None for 8192
    tokens and one whole picture, or what the model can read. Raises VlquantError for what cannot be planned.
    """
    if device not in PLACES:
        raise InvalidRequest(f"device {device!r} is unknown; use {' or '.join(PLACES)}")
    weights, own, remarks = weights_of(model, report)
    config, path = weights.config, Path(model).expanduser()
    kernels = device == "cpu" and native_kernels() is not None
    limit = memory or (GPU_BYTES if device == "cuda" else available_memory() or physical_memory())
    context, tiles = asked_size(config, context, tiles)
    methods = {own: weights} if own else dict(methods_of(weights))
    impossible = [] if own else [name for name in FORMS if name not in methods]
    groups = f"in groups of {Recipe.group_size} is not possible: widths of this model's linears are no multiples of that"
    remarks += tuple(f"{name} {groups}" for name in impossible) + (() if kernels or device == "cuda" else (NO_KERNELS,))
    return Plan(
        model=path.resolve().name if path.is_dir() else str(model),
        device=device,
        limit=limit,
        context=context,
        tiles=tiles,
        tokens_per_tile=config.chat.tokens_per_tile,
        position_limit=position_limit(config.decoder),
        choices=tuple(
            choose(held, place, limit, method=method, vision=vision, size=(context, tiles))
            for method, held in methods.items()
            for place in [running_place(PLACES[device], held, kernels=kernels)]
            for vision in place.visions
        ),
        remarks=remarks,
    )


def weights_of(model: str | Path, report: Report) -> tuple[Weights, str | None, tuple[str, ...]]:
    """The weights of a model, what quantized them already, and remarks; from its folder, the hub, or the published shapes."""
    name = str(model)
    path = Path(name).expanduser()
    hub_id = name if "/" in name else f"{HUB_OWNER}/{name}"
    if path.exists() or (name not in KNOWN_MODELS and not is_hub_id(name)):
        return (*stored_weights(resolve_model(model)), ())  # Which says what is wrong with other names.
    try:
        return (*stored_weights(resolve_model(hub_id, network=False)), ())
    except (BrokenCheckpoint, MissingDependency):
        report(Event("headers", message=f"{name} is not here: asking the hub what it is made of, without downloading it"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch_headers(hub_id, Path(folder))
            return (*stored_weights(Path(folder)), (f"{hub_id} is not here: planned from its headers on the hub",))
        except VlquantError as error:
            known = hub_id.removeprefix(f"{HUB_OWNER}/")
            if known not in MEMBERS or not isinstance(error, (BrokenCheckpoint, MissingDependency)):
                raise type(error)(str(error).replace(folder, hub_id)) from error
            reason = next(iter(str(error.__cause__ or error).strip().splitlines()), "no reason given")
    return published_weights(known), None, (f"planned from the published shapes of {known}, as the hub cannot be asked: {reason}",)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder here reads "owner/name"."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def stored_weights(folder: Path) -> tuple[Weights, str | None]:
    """The weights of a checkpoint or bundle as its headers tell, and what they are quantized with, None if they are not."""
    model = open_model(folder, whole=False)
    names = list(linear_names(language_shapes(model.config.decoder)))
    settings = quantization_settings(folder)
    linears = {name: quantized_form(model, name, settings) if is_quantized(model, name) else float_form(model, name) for name in names}
    head = EMBEDDING if model.config.decoder.tied_head else HEAD
    weights = Weights(model.config, linears, embedding=float_form(model, EMBEDDING), head=float_form(model, head))
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return replace(weights, head_bits=bits_of_head(manifest)), Recipe.from_dict(manifest.recipe).label
    quantized = any(is_quantized(model, name) for name in names)
    return replace(weights, in_bundle=not quantized), "as it is" if quantized else None


def quantized_form(model: Model, name: str, settings: Mapping) -> Form:
    """How the running model holds a linear that is stored quantized; settings: what config.json says of it."""
    module = name.removesuffix(".weight")
    if model.has(f"{module}.weight.absmax"):
        return FORMS["NF4"]
    if model.has(f"{module}.SCB"):
        return FORMS["int8"]
    columns = language_shapes(model.config.decoder)[name][1]
    words, groups = (model.checkpoint.shape(model.stored_name(module + kind))[0] for kind in (".qweight", ".scales"))
    # A file that says nothing of the two is taken to be as most are.
    group_bytes = SCALE if settings.get("sym", True) else SCALE_AND_ZERO
    return Form(32 * words // columns, columns // groups, group_bytes, in_order=not settings.get("desc_act", False))


def float_form(model: Model, name: str) -> Form:
    """How the running model holds a float matrix: as it is stored."""
    return Form(8 * model.stored_dtype(name).itemsize)


def published_weights(name: str) -> Weights:
    """The weights of a published model in 16 bits."""
    config = parse_config(member_config(MEMBERS[name]), name)
    return Weights(config, dict.fromkeys(linear_names(language_shapes(config.decoder)), HALF))


def methods_of(weights: Weights) -> Iterator[tuple[str, Weights]]:
    """A float model as it is, and by every method that its shapes allow."""
    yield f"float{max(form.bits for form in weights.linears.values())}", weights
    shapes = layer_shapes(weights.config.decoder, 0)
    for method, recipe in RECIPES.items():
        try:
            for name in linear_names(shapes):
                recipe.require_shape(name, out_features=shapes[name][0], in_features=shapes[name][1])
        except InvalidRecipe:
            continue
        yield method, replace(weights, linears=dict.fromkeys(weights.linears, FORMS[method]))


def asked_size(config: ModelConfig, context: int | None, tiles: int | None) -> tuple[int, int]:
    """Context and tiles to plan for; raises InvalidRequest if no conversation has that size."""
    chat, most = config.chat, position_limit(config.decoder)
    context = min(CONTEXT, most) if context is None else context
    if not TEXT_TOKENS <= context <= most:
        raise InvalidRequest(f"a context of {context} tokens is not possible; this model takes --context {TEXT_TOKENS} to {most}")
    room = (context - TEXT_TOKENS) // chat.tokens_per_tile
    tiles = min(room, chat.max_tiles + (chat.use_thumbnail and chat.max_tiles > 1)) if tiles is None else tiles
    fitting = f"--tiles 0 to {room}" if room else "--tiles 0"
    if tiles < 0:
        raise InvalidRequest(f"--tiles is {tiles}, and a conversation has none or more; use {fitting}")
    needed = TEXT_TOKENS + tiles * chat.tokens_per_tile
    if needed > context:
        larger = f", or --context {needed}" if needed <= most else ""
        raise InvalidRequest(
            f"{counted(tiles, 'tile')} of {chat.tokens_per_tile} tokens and {TEXT_TOKENS} for question and answer take {needed} "
            f"tokens of {context}; use {fitting}{larger}"
        )
    return context, tiles


def choose(weights: Weights, place: Place, limit: int, *, method: str, vision: str, size: tuple[int, int]) -> Choice:
    """What one choice takes at `size` (context, tiles) in a place, and how far it reaches within `limit` bytes."""
    config, (context, tiles) = weights.config, size
    per_tile, most = config.chat.tokens_per_tile, position_limit(config.decoder)

    def memory_of(context: int, tiles: int) -> Memory:
        return model_memory(weights, place, vision=vision, context=context, tiles=tiles)

    def fits(context: int, tiles: int) -> bool:
        return memory_of(context, tiles).total <= limit

    memory = memory_of(context, tiles)
    return Choice(
        method=method,
        vision=vision,
        memory=memory,
        total=memory.total,
        fits=fits(context, tiles),
        largest_context=largest(lambda tokens: fits(tokens, tiles), TEXT_TOKENS + tiles * per_tile, most),
        most_tiles=largest(lambda count: fits(TEXT_TOKENS + count * per_tile, count), 0, (most - TEXT_TOKENS) // per_tile),
    )


def largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number from `low` to `high` that fits, if every smaller one does too; None if `low` does not."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def parse_bytes(text: str) -> int:
    """Bytes that "11GB", "10.5 GiB", "8000MB" or "11" (GB) mean; raises InvalidRequest for anything else."""
    number = text.strip().rstrip("BbGgIiMm ")
    unit = UNITS.get(text.strip()[len(number) :].strip().upper())
    try:
        count = float(number) * (unit or 0)
    except ValueError:
        count = 0
    if not 1 <= count < 2**60:
        raise InvalidRequest(f"{text!r} is no amount of memory; write it like 11GB, 10.5GiB or 8000MB")
    return int(count)


def to_json(found: Plan) -> str:
    """A plan for programs: one line."""
    return json.dumps({**asdict(found), "fits": found.fits}, ensure_ascii=False)


def from_json(text: str) -> Plan:
    """The inverse of `to_json`."""
    fields = json.loads(text)
    choices = [Choice(**{**choice, "memory": Memory(**choice["memory"])}) for choice in fields["choices"]]
    del fields["fits"]
    return Plan(**{**fields, "choices": tuple(choices), "remarks": tuple(fields["remarks"])})
