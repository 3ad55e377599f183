"""How a language model is to be quantized: the one home of every default. Imports nothing heavy."""

import os.path
from dataclasses import asdict, dataclass

from vlquant.errors import InvalidRecipe

METHODS = ("gptq", "rtn", "bnb")
BITS = {"gptq": (3, 4, 8), "rtn": (3, 4, 8), "bnb": (4, 8)}
HEAD_BITS = (8, 16)
GROUP_SIZES = (32, 64, 128, -1)
USED = {
    "gptq": ("average_bits", "group_size", "damping", "compensation", "vision_share", "answer_share", "calibration", "samples", "tokens", "seed"),
    "rtn": ("group_size",),
    "bnb": (),
}
"""Fields that each method uses beside its own name and the bits."""
SETS_SEPARATOR = " + "
"""Between the names of calibration sets where a recipe is stored."""
CODES_MULTIPLE = 32
"""GPTQ packs codes into 32-bit words along both axes, so both must be multiples of this."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the quantized weights, given a model; stored in the bundle.

    Raises InvalidRecipe if a field has a value that no model could be quantized with.
    """

    method: str = "gptq"
    """"gptq", "rtn" (rounding with searched scales, stored as GPTQ is) or "bnb" (bitsandbytes: NF4 for 4 bits, int8 for 8)."""
    bits: int = 4
    """Bits per weight: 4, 8 or, experimental and not with bitsandbytes, 3."""
    average_bits: float | None = None
    """Bits per weight on average, between 4 and 8: linears that need it most get 8, the others 4. GPTQ only."""
    head_bits: int = 8
    """Bits of the head while answering on a CPU: 8, rounded row by row when loaded, or 16, as stored. The checkpoint's stays float."""
    group_size: int = 128
    """Input columns sharing one scale; -1: all of them. GPTQ and RTN."""
    damping: float = 0.05
    """Share of the mean diagonal added to the diagonal of the Hessian. GPTQ only."""
    compensation: float = 1.0
    """Largest share of earlier layers' error that a linear may make up for, 0 .. 1; 0 saves a third of the time. GPTQ only."""
    vision_share: float = 0.45
    """Weight of all picture tokens together in what is minimised, 0 .. 1: they outnumber the text ten to one. GPTQ only."""
    answer_share: float = 0.40
    """Weight of all answer tokens together; what is left is the prompt's. GPTQ only."""
    calibration: tuple[str, ...] = ("builtin",)
    """Calibration sets, which take turns: "builtin", "photos", files or folders; stored without the folders they are in. GPTQ only."""
    samples: int = 128
    """Conversations taken from the calibration sets. GPTQ only."""
    tokens: int = 2048
    """Most tokens of a calibration conversation; its pictures get fewer tiles to stay below, down to one each. GPTQ only."""
    seed: int = 0
    """Which conversations are taken of the calibration sets. GPTQ only."""

    def __post_init__(self) -> None:
        if isinstance(self.calibration, str):
            object.__setattr__(self, "calibration", (self.calibration,))
        if self.method not in METHODS:
            raise InvalidRecipe(f"method {self.method!r} is unknown; use --method {' or --method '.join(METHODS)}")
        if self.bits not in BITS[self.method]:
            raise InvalidRecipe(f"{self.bits} bits per weight are not supported by {self.method}; use --bits 4 or --bits 8")
        if self.average_bits is not None and not (self.bits == 4 and 4 < self.average_bits < 8):
            raise InvalidRecipe(
                f"an average of {self.average_bits} bits with --bits {self.bits} is not possible; it is made of 4 and 8: "
                "use --bits 4 and an --average-bits between 4 and 8"
            )
        if self.head_bits not in HEAD_BITS:
            raise InvalidRecipe(f"a head of {self.head_bits} bits is not supported; use --head-bits 8, or 16 for the stored one")
        if self.group_size not in GROUP_SIZES:
            raise InvalidRecipe(
                f"group size {self.group_size} is not supported; use --group-size 32, 64, 128 or -1 (whole rows)"
            )
        others = [name for name in USED["gptq"] if name not in USED[self.method]]
        without_use = [name for name in others if getattr(self, name) != getattr(Recipe, name)]
        if without_use:
            word = without_use[0].replace("_", "-")
            option = "calib" if word == "calibration" else word
            raise InvalidRecipe(f"method {self.method} has no use for a {word}; leave --{option} out or use --method gptq")
        if not 0 < self.damping <= 0.5:
            raise InvalidRecipe(f"damping {self.damping} is outside 0 .. 0.5; {Recipe.damping} is a good value")
        if not 0 <= self.compensation <= 1:
            raise InvalidRecipe(f"compensation {self.compensation} is outside 0 .. 1; {Recipe.compensation} is a good value")
        if not min(self.class_shares) >= 0:
            raise InvalidRecipe(
                f"shares of {self.vision_share} for pictures and {self.answer_share} for answers are not parts of 1; "
                f"use --vision-share {Recipe.vision_share} and --answer-share {Recipe.answer_share}"
            )
        if not self.calibration or not all(self.calibration):
            raise InvalidRecipe("a calibration set has no name; use --calib builtin, or a file or folder of your own")
        if self.tokens < 1:
            raise InvalidRecipe(f"{self.tokens} tokens per calibration conversation are too few; use --tokens 1 or more")
        if self.samples < 1:
            raise InvalidRecipe(f"{self.samples} calibration samples are too few; use --samples 1 or more")

    @property
    def label(self) -> str:
        """How the bundle's name tells the recipe: "gptq-4bit", "gptq-4.6bit"."""
        return f"{self.method}-{self.average_bits or self.bits:g}bit"

    def to_dict(self) -> dict:
        """The fields that this method uses, ready for JSON."""
        names = SETS_SEPARATOR.join(os.path.basename(os.path.abspath(each)) for each in self.calibration)
        fields, used = {**asdict(self), "calibration": names}, ("method", "bits", "head_bits", *USED[self.method])
        return {name: value for name, value in fields.items() if name in used and value is not None}

    @property
    def class_shares(self) -> tuple[float, float, float]:
        """Weights of picture, prompt and answer tokens, 1 together."""
        return self.vision_share, round(1 - self.vision_share - self.answer_share, 9), self.answer_share

    @property
    def packed_as_gptq(self) -> bool:
        """Whether weights are stored in GPTQ's format."""
        return self.method != "bnb"

    @staticmethod
    def from_dict(fields: dict) -> "Recipe":
        """The inverse of `to_dict`; raises InvalidRecipe for fields this version does not know."""
        unknown = sorted(set(fields) - set(Recipe.__dataclass_fields__))
        if unknown:
            raise InvalidRecipe(f"recipe fields {', '.join(unknown)} are unknown; a newer vlquant may know them")
        sets = fields.get("calibration")
        return Recipe(**fields if sets is None else {**fields, "calibration": tuple(sets.split(SETS_SEPARATOR))})

    def require_shape(self, name: str, *, out_features: int, in_features: int) -> None:
        """Raise InvalidRecipe if the linear `name` with a [out_features, in_features] weight cannot be quantized so."""
        if not self.packed_as_gptq:
            return
        if in_features % CODES_MULTIPLE or out_features % CODES_MULTIPLE:
            raise InvalidRecipe(
                f"{name} has {out_features} x {in_features} weights, which GPTQ cannot pack because both must be "
                f"multiples of {CODES_MULTIPLE}; use --method bnb"
            )
        if self.group_size != -1 and in_features % self.group_size:
            fitting = [str(size) for size in GROUP_SIZES if size != -1 and in_features % size == 0]
            raise InvalidRecipe(
                f"group size {self.group_size} does not divide the {in_features} inputs of {name}; "
                f"use --group-size {' or '.join(fitting)} or -1"
            )

    def groups(self, in_features: int) -> int:
        """Scales per output row of a linear with this many inputs."""
        return 1 if self.group_size == -1 else in_features // self.group_size
