"""`vlquant doctor`: what this machine can run, what is broken and why, and the command that mends it.

Judges facts that `vlquant.probes` found; looks at nothing itself, so that any machine can be made up.
"""

from dataclasses import dataclass
from itertools import chain

from vlquant import gpu_support as support
from vlquant.doctor_facts import facts
from vlquant.doctor_rules import BROKEN, EVERYTHING, RULES, SLOW, UNUSED, Finding, Install, dotted, installs
from vlquant.gpu_support import Capability
from vlquant.nvidia import Gpu
from vlquant.probes import Probes

YES, NO = "yes", "no"
BROKEN_EXIT_CODE = 3  # As a check that failed.
NOT_MEASURED = "Derived from versions and from what loads: speed and results are not measured on this card."


@dataclass(frozen=True)
class Row:
    """Whether one thing runs on a card."""

    name: str
    runs: str
    """YES, NO or SLOW."""
    why: str


@dataclass(frozen=True)
class Card:
    name: str
    capability: Capability
    generation: str
    memory_bytes: int
    rows: tuple[Row, ...]
    measured: str = NOT_MEASURED


@dataclass(frozen=True)
class Diagnosis:
    """What was found; the schema of --json."""

    facts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    cards: tuple[Card, ...]
    verdict: tuple[str, ...]
    install: tuple[Install, ...]
    """What gives this machine what it can run, from the pinned sets, all that is broken replaced; several exclude each other."""
    exit_code: int
    """0: vlquant can run, with or without a GPU; 3: something installed is broken."""


def doctor(probes: Probes) -> Diagnosis:
    """Judge a machine. No GPU is nothing bad; a build that has no code for the GPU that is there is."""
    findings = tuple(dict.fromkeys(chain.from_iterable(rule(probes) for rule in RULES)))
    cards = tuple(card(gpu, probes, findings) for gpu in probes.gpus)
    replaced = tuple(dict.fromkeys(chain.from_iterable(each.replace for each in findings)))
    ways = tuple(installs(probes, remove=replaced))
    return Diagnosis(
        facts=tuple(facts(probes)),
        findings=findings,
        cards=cards,
        verdict=tuple(verdict(probes, cards, ways)),
        install=ways,
        exit_code=BROKEN_EXIT_CODE if any(each.severity == BROKEN for each in findings) else 0,
    )


def card(gpu: Gpu, probes: Probes, findings: tuple[Finding, ...]) -> Card:
    """What runs on one card, and why."""
    mine = [each for each in findings if each.card in (None, gpu.name)]
    rows = [row(ability, gpu.capability, probes, mine) for ability in support.ABILITIES]
    rows += [Row(name, NO, why) for name, why in support.CPU_ONLY]
    return Card(gpu.name, gpu.capability, support.generation(gpu.capability), gpu.memory_bytes, tuple(rows))


def row(ability: support.Ability, capability: Capability, probes: Probes, findings: list[Finding]) -> Row:
    """One line of a card's table: the first thing that stands in the way, or what carries it."""
    if capability < ability.lowest:
        return Row(ability.name, NO, f"it begins at compute capability {dotted(ability.lowest)}, and the card has {dotted(capability)}")
    concerned = [each for each in findings if each.part in ability.needs or each.part == EVERYTHING]
    for each in concerned:
        if each.severity in (BROKEN, UNUSED):
            return Row(ability.name, NO, each.sentence)
    if missing := [part for part in ability.needs if not is_there(part, probes)]:
        return Row(ability.name, NO, f"{missing[0]} is not installed, or does not load")
    slow = next((each.sentence for each in concerned if each.severity == SLOW), None)
    return Row(ability.name, SLOW, slow) if slow else Row(ability.name, YES, ability.carried_by)


def is_there(part: str, probes: Probes) -> bool:
    """Whether something that an ability needs is installed at all."""
    present = {"driver": probes.driver, "torch": probes.torch, "onnxruntime": probes.ran, "cudnn": True, "nvrtc": probes.nvrtc}
    return bool(present.get(part, part in probes.versions))


def verdict(probes: Probes, cards: tuple[Card, ...], ways: tuple[Install, ...]) -> list[str]:
    """What works and what does not, a line for the CPU and one for each card."""
    lines = ["vlquant runs on the CPU" if probes.torch else "vlquant cannot run without torch"]
    for each in cards:
        works = [row.name + (" (slow)" if row.runs == SLOW else "") for row in each.rows if row.runs != NO]
        not_here = [row.name for row in each.rows if row.runs == NO]
        lines.append(f"{each.name}: runs {', '.join(works) or 'nothing'}; not {', '.join(not_here)}")
    if not cards and not probes.unseen:
        lines.append("no GPU that could be used was found, which is nothing wrong")
    if len(ways) > 1:
        lines.append("no set of versions serves all of these cards: each way below excludes the others, and takes an environment of its own")
    return lines
