"""What a check found: the schema of report.json. Knows no model and measures nothing.

Scores, differences and margins are fractions of 1, divergences nats per token. No times and no paths: the same check
gives the same bytes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vlquant.distributions import DistributionSummary
from vlquant.errors import BrokenCheckpoint
from vlquant.intervals import Interval
from vlquant.verdict import FAIL, INCONCLUSIVE, PASS, KindVerdict, Verdict

FORMAT_VERSION = 3
EXIT_CODES = {PASS: 0, FAIL: 3, INCONCLUSIVE: 4}


@dataclass(frozen=True)
class AskedSet:
    """A check set as far as it was asked."""

    name: str
    sha256: str
    pictures: int
    questions: int
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class AnswerFaults:
    """Answers that are wrong by their form."""

    truncated: int
    """Cut at the largest number of tokens."""
    empty: int
    unparsed: int
    """Without a form that the metric can read: no option, no box, neither yes nor no."""


@dataclass(frozen=True)
class Flips:
    """How scored answers changed."""

    lost: int
    """Better in the reference."""
    won: int
    """Better in the bundle."""
    changed: int
    """With another text, right or wrong."""


@dataclass(frozen=True)
class GeneratedResult:
    """What both models answered on their own; scores are means over pictures."""

    questions: int
    """With a known answer."""
    reference: float
    quantized: float
    display: Interval
    """95 % bootstrap interval of the difference, which decides nothing."""
    flips: Flips
    chance: float
    """McNemar's exact p-value: how often chance alone parts lost and won so unevenly."""
    reference_faults: AnswerFaults
    quantized_faults: AnswerFaults
    set_scores: dict[str, dict[str, tuple[float, float]]]
    """By set and by name of what a benchmark reports of a whole set: reference, quantized."""


@dataclass(frozen=True)
class KindResult:
    """One kind of question."""

    kind: str
    questions: int
    verdict: KindVerdict | None
    """None: nobody scored it."""
    quantized: float | None
    flips: Flips | None
    divergence: float | None
    """Mean over its answer tokens."""


@dataclass(frozen=True)
class HistogramBin:
    """Answer tokens whose divergence is in low <= nats < high."""

    low: float
    high: float
    tokens: int


@dataclass(frozen=True)
class NoiseFloor:
    """The reference beside itself, in batches of another size: what no quantizing did."""

    questions: int
    changed: int
    divergence: float


@dataclass(frozen=True)
class Blame:
    """Where the divergence comes from, on some of the questions: mean nats with only one part as in the bundle."""

    questions: int
    vision: float | None
    """ONNX vision before the float language model; None: vision was not exported, or no question has pictures."""
    language_model: float
    """Quantized language model behind torch vision."""
    both: float


@dataclass(frozen=True)
class LayerErrors:
    """Mean relative error of a layer's linears when they were quantized, as the manifest has it."""

    layer: int
    error: float | None
    class_errors: dict[str, float | None]


@dataclass(frozen=True)
class Disagreement:
    """A question that both answered differently."""

    key: str
    kind: str
    question: str
    gold: tuple[str, ...]
    reference: str
    quantized: str
    reference_score: float | None
    quantized_score: float | None


@dataclass(frozen=True)
class CheckResult:
    """Everything a check found."""

    format_version: int
    bundle: str
    bundle_sha256: str
    """Of its manifest, which has the hashes of all its files."""
    reference: str
    reference_sha256: str
    """Of the names and hashes of the reference's files."""
    vision: str
    """"onnx" with the precision, or "torch (vision not checked)"."""
    sets: tuple[AskedSet, ...]
    seed: int
    max_new_tokens: int
    predictions_sha256: str | None
    """Of the file that the reference's answers were taken from; None: it answered itself, or not at all."""
    forced_text: str
    """Whose answers the distributions were compared along: "imported", "reference", "gold" or "bundle"."""
    verdict: Verdict
    distribution: DistributionSummary | None
    histogram: tuple[HistogramBin, ...]
    generated: GeneratedResult | None
    """None: a model did not fit the memory allowed."""
    kinds: tuple[KindResult, ...]
    noise_floor: NoiseFloor | None
    blame: Blame | None
    layers: tuple[LayerErrors, ...]
    disagreements: tuple[Disagreement, ...]
    """Lost answers first; those beyond the first ones are in the predictions."""
    recipe: dict
    libraries: dict[str, str]

    @property
    def pictures(self) -> int:
        return sum(each.pictures for each in self.sets)

    @property
    def questions(self) -> int:
        return sum(each.questions for each in self.sets)

    @property
    def exit_code(self) -> int:
        """0 passed, 3 failed, 4 inconclusive."""
        return EXIT_CODES[self.verdict.outcome]


def to_json(result: CheckResult) -> str:
    """The text of report.json."""
    return json.dumps(asdict(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_result(path: Path) -> CheckResult:
    """A result from its report.json; raises BrokenCheckpoint if it is none that this version reads."""
    try:
        return TypeAdapter(CheckResult).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BrokenCheckpoint(f"{path} is no result of a check that this vlquant reads; run vlquant check again") from error
