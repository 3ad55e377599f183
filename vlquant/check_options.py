"""What a check asks, and how it is judged: the one home of its defaults. Imports nothing heavy."""

from dataclasses import dataclass

from vlquant.errors import InvalidRequest


@dataclass(frozen=True)
class CheckOptions:
    """What is asked and how it is judged; defaults for everyone."""

    sets: tuple[str, ...] = ("builtin",)
    """"builtin", .tsv files (VLMEvalKit), .jsonl or .json files (InternVL fine-tuning)."""
    limit: int | None = None
    """Questions of each set; pictures are asked about whole."""
    seed: int = 0
    """Another built-in set of the same kind; which pictures are taken of a file."""
    metric: str | None = None
    """How answers to all sets are scored; None: as known by their names or columns."""
    max_drop: float | None = None
    """Largest acceptable drop in points; None: by the bundle's bits."""
    memory: float | None = None
    """GB that a model may take to answer by itself; None: what is available."""
    max_new_tokens: int = 128
    """Tokens after which an answer is cut, in both models."""
    reference_predictions: str | None = None
    """A TSV file of the reference's answers, made elsewhere."""
    device: str = "cpu"
    vision: str = "onnx"
    """Which of the bundle's vision towers: that for the device, as `vlquant chat` takes it, or "fp32", "fp16", "int8" or "torch"."""

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise InvalidRequest(f"a drop of {self.max_drop} points is no margin; give --max-drop 0 to 100")
        if self.memory is not None and not self.memory >= 0:
            raise InvalidRequest(f"a memory of {self.memory} GB cannot be kept to; give --memory 0 or more")
        if not self.sets:
            raise InvalidRequest("no set is named; give --set builtin or a file")
        if self.reference_predictions is not None and len(self.sets) > 1:
            raise InvalidRequest("--reference-predictions are answers to one set; check the sets one by one")
