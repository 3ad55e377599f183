"""`vlquant bench`: how fast a bundle is and how much memory it takes, beside its peers, in alternating rounds."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from vlquant.bench_options import BenchOptions
from vlquant.bench_result import OURS, SPEED, BenchResult, Series
from vlquant.bundle import MANIFEST, find_bundle
from vlquant.config import ModelConfig, read_config
from vlquant.contestants import CONTESTANTS, ContestantProcess, choose_peers, settings_for
from vlquant.errors import BrokenCheckpoint, InvalidRequest
from vlquant.events import Event, Report, silent
from vlquant.machine import Machine, this_machine
from vlquant.runtime.reader import position_limit
from vlquant.vision_manifest import NAMES, read_vision_manifest

PAUSE_SECONDS = 0.2
"""Before a measurement: idle threads of OpenMP and ONNX Runtime spin for some milliseconds before they sleep."""
DECODING = {"prefill", "decode", "batch"}
"""What is measured by other kernels of ours too."""
WITH_TOWER = {"vision", "picture"}
"""What the vision tower takes part in."""
PICTURE_MEMORY = "peak memory, picture answered"


@dataclass(frozen=True)
class Task:
    """What a loaded contestant does once in each round."""

    measure: str
    """One of MEASURES."""
    title: str
    name: str
    """Of the contestants' method."""
    arguments: Mapping
    tokens: int = 0
    """What is divided by its seconds; 0: the seconds count."""
    tower: str | None = None
    """Precision of the exported vision tower that it is about; None: of the one that ours takes for a picture."""

    @property
    def unit(self) -> str:
        return SPEED if self.tokens else "s"

    def value(self, seconds: float) -> float:
        """In `unit`."""
        return self.tokens / seconds if self.tokens else seconds


class Rounds:
    """Values by title, unit and contestant, what vision tower each ran for a title, and who fell out."""

    def __init__(self):
        self.values: dict[tuple[str, str, str], list[float]] = {}
        self.towers: dict[tuple[str, str], str] = {}
        self.facts: dict[str, dict] = {}
        self.not_measured: dict[str, str] = {}

    def learn(self, contestant: str, facts: dict) -> None:
        """What one says of itself."""
        self.facts[contestant] = self.facts.get(contestant, {}) | facts

    def add(self, title: str, unit: str, contestant: str, value: float | None) -> None:
        """One round's value."""
        if value is not None:
            self.values.setdefault((title, unit, contestant), []).append(value)

    def drop(self, contestant: str, error: BrokenCheckpoint, report: Report) -> None:
        """A peer that failed is out, with the reason; raises the error if it is ours."""
        if contestant == OURS:
            raise error
        self.not_measured[contestant] = str(error)
        report(Event("bench", message=f"{contestant}: {error}"))

    def series(self) -> tuple[Series, ...]:
        """What was found."""
        return tuple(
            Series(title, unit, name, tuple(values), self.towers.get((title, name)))
            for (title, unit, name), values in self.values.items()
        )

    @property
    def chosen_tower(self) -> str:
        """Precision of the tower that ours takes for a picture, as it says of itself."""
        short = self.facts[OURS]["vision"].split()[-1]
        return next((name for name, known in NAMES.items() if known == short), short)


def bench(
    bundle: str | Path, work: Path, *, options: BenchOptions = BenchOptions(), machine: Machine | None = None, report: Report = silent
) -> BenchResult:
    """Measure a bundle and its peers; every contestant is a process of its own, and one at a time computes.

    work: an existing folder for what peers need; files of an earlier bench are used again. machine: as it was before anything
    was computed, None: now. Raises InvalidRequest or MissingDependency for what cannot be measured, BrokenCheckpoint if ours
    fails; a peer that fails is left out and named.
    """
    folder, machine = require_bundle(bundle), machine or this_machine(torch.get_num_threads())
    config = read_config(folder)
    require_room(config, options)
    tasks = tasks_for(folder, options)
    possible = {each.measure for each in tasks} | {"start"} & set(options.measures)
    if not possible:
        raise InvalidRequest(f"there is nothing to measure, {without_tower(folder)}")
    if machine.is_busy:
        report(Event("bench", message=f"warning: somebody is computing here, the load average being {machine.load_average:.1f}"))
    peers, absent = choose_peers(options.against, config)
    settings = settings_for(folder, work, config, machine.threads)
    rounds = Rounds()
    rounds.not_measured |= absent
    if left_out := [each for each in options.measures if each not in possible]:
        rounds.not_measured[", ".join(left_out)] = without_tower(folder)
    rounds.not_measured |= idle_kernels(options, possible)
    peers = prepared(comparable(peers, folder, options, possible, rounds), settings, rounds, report)
    if "start" in options.measures:
        measure_starts(peers, settings, options, rounds, report)
    if tasks:
        measure_tasks(peers, settings, options, rounds, tasks=tasks, report=report)
    return BenchResult(
        model=folder.name,
        shape=shape_of(config),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        options=options,
        machine=machine,
        contestants=rounds.facts,
        series=rounds.series(),
        not_measured=rounds.not_measured,
    )


def comparable(peers: list[str], folder: Path, options: BenchOptions, possible: set[str], rounds: Rounds) -> list[str]:
    """Those peers that can be measured in something; the others are named. Raises InvalidRequest for one that was asked for."""
    reasons = {}
    for name in peers:
        measures = CONTESTANTS[name].measures
        if not measures & set(options.measures):
            reasons[name] = f"of {', '.join(options.measures)} it measures none, only {', '.join(sorted(measures))}"
        elif not measures & possible:
            reasons[name] = without_tower(folder)
    for name, reason in reasons.items() if options.against else ():
        raise InvalidRequest(f"{name} cannot be measured: {reason}; leave it out of --against")
    rounds.not_measured |= reasons
    return [each for each in peers if each not in reasons]


def by_kernels(options: BenchOptions) -> dict[str, str]:
    """Names of ours by other kernels, and what asks for these."""
    return {f"{OURS}, {each} kernels": each for each in options.kernels}


def idle_kernels(options: BenchOptions, possible: set[str]) -> dict[str, str]:
    """Ours by other kernels, with the reason, where nothing is measured that is measured by those."""
    reason = f"of {', '.join(options.measures)} it measures none, only {', '.join(sorted(DECODING))}"
    return {} if DECODING & possible else dict.fromkeys(by_kernels(options), reason)


def without_tower(folder: Path) -> str:
    """Why no vision tower is measured."""
    return f"{folder.name} having no exported vision tower; run vlquant export-vision {folder}"


def require_bundle(named: str | Path) -> Path:
    """The folder of a complete bundle; raises InvalidRequest if it is none."""
    folder = Path(named)
    if not (folder / MANIFEST).is_file():
        raise InvalidRequest(f"{named} is no bundle; make one with vlquant quantize, or measure a --shape")
    return find_bundle(folder)


def require_room(config: ModelConfig, options: BenchOptions) -> None:
    """Raise InvalidRequest if the model has not as many positions as are to be measured."""
    limit = position_limit(config.decoder)
    if options.longest > limit:
        raise InvalidRequest(f"the model takes {limit} tokens and {options.longest} are to be measured; lower --prompts, --contexts or --tokens")


def shape_of(config: ModelConfig) -> dict:
    """Sizes that speed depends on."""
    return {"language_model": asdict(config.decoder), "vision_layers": config.vision.layers, "tile": config.vision.image_size}


def towers_of(bundle: Path) -> dict[str, Path]:
    """Folders of a bundle's exported towers by precision."""
    return {read_vision_manifest(path.parent).precision: path.parent.resolve() for path in sorted(bundle.glob("vision*/model.onnx"))}


def tasks_for(bundle: Path, options: BenchOptions) -> list[Task]:
    """What is done in each round, in order."""
    tasks = [
        Task("vision", f"tile, {precision}", "vision", {"folder": str(path)}, tower=precision)
        for precision, path in towers_of(bundle).items()
    ]
    tasks += [Task("picture", "first token, one tile", "picture", {})] if tasks else []
    tasks += [Task("prefill", f"prefill {length}", "prefill", {"length": length}, length) for length in options.prompts]
    decoded = [("decode", f"decode after {context}", context, 1) for context in options.contexts]
    decoded += [("batch", f"decode {options.batch} side by side after {options.contexts[0]}", options.contexts[0], options.batch)]
    for measure, title, context, batch in decoded:
        arguments = {"context": context, "batch": batch, "tokens": options.tokens}
        tasks.append(Task(measure, title, "decode", arguments, batch * options.tokens))
    return [each for each in tasks if each.measure in options.measures]


def prepared(peers: list[str], settings: dict, rounds: Rounds, report: Report) -> list[str]:
    """The peers that have the files they need; those are made in a process that is not measured."""
    for name in [each for each in peers if CONTESTANTS[each].prepares]:
        report(Event("bench", message=f"{name}: making a model of this shape, unless there is one"))
        try:
            with ContestantProcess(name, CONTESTANTS[name].module, settings) as process:
                rounds.learn(name, process.ask("prepare"))
        except BrokenCheckpoint as error:
            rounds.drop(name, error, report)
    return [each for each in peers if each not in rounds.not_measured]


def measure_starts(peers: list[str], settings: dict, options: BenchOptions, rounds: Rounds, report: Report) -> None:
    """Fresh processes in every round: from nothing to the first token, and the memory that answering takes."""
    names = [name for name in (OURS, *peers) if "start" in CONTESTANTS[name].measures]
    has_towers = bool(towers_of(Path(settings["bundle"])))
    # The first round is not counted: it reads files from the disk, and ours packs its weights for this processor.
    for number, name in turns(names, options.rounds, "starts", report):
        time.sleep(PAUSE_SECONDS)
        try:
            with ContestantProcess(name, CONTESTANTS[name].module, settings) as process:
                rounds.learn(name, process.ask("load"))
                found = first_answers(process, rounds, picture=name == OURS and has_towers)
        except BrokenCheckpoint as error:
            rounds.drop(name, error, report)
            names.remove(name)
            continue
        for (title, unit), value in found.items() if number else ():
            rounds.add(title, unit, name, value)
        if (PICTURE_MEMORY, "bytes") in found:
            rounds.towers[PICTURE_MEMORY, name] = rounds.chosen_tower


def first_answers(process: ContestantProcess, rounds: Rounds, *, picture: bool) -> dict[tuple[str, str], float | None]:
    """What a loaded process needed until it had answered, by title and unit; prompts are as long as ours, who comes first."""
    load, ours = rounds.facts[process.name]["load_seconds"], rounds.facts[OURS]
    found = {
        ("process start with imports", "s"): process.start_seconds,
        ("load", "s"): load,
        ("load to first token of a text", "s"): load + process.ask("text", tokens=ours["text_tokens"])["seconds"],
        ("peak memory, text answered", "bytes"): process.ask("memory")["bytes"],
    }
    if picture:
        process.ask("picture", tokens=ours["picture_tokens"])
        found[PICTURE_MEMORY, "bytes"] = process.ask("memory")["bytes"]
    return found


def measure_tasks(
    peers: list[str], settings: dict, options: BenchOptions, rounds: Rounds, *, tasks: list[Task], report: Report
) -> None:
    """All contestants loaded, one measurement at a time, contestants in turn; a warm-up before the first round."""
    with ExitStack() as stack:
        entrants = {OURS: (CONTESTANTS[OURS], None)}
        entrants |= {
            name: (CONTESTANTS[OURS], each) for name, each in by_kernels(options).items() if name not in rounds.not_measured
        }
        entrants |= {name: (CONTESTANTS[name], None) for name in peers}
        running = {}
        for name, (kind, kernels) in entrants.items():
            try:
                process = stack.enter_context(ContestantProcess(name, kind.module, settings, kernels=kernels))
                rounds.learn(name, process.ask("load"))
            except BrokenCheckpoint as error:
                rounds.drop(name, error, report)
                continue
            running[name] = process, DECODING if kernels else kind.measures
        for task in tasks:
            measure_task(task, running, options, rounds, report)


def measure_task(task: Task, running: dict, options: BenchOptions, rounds: Rounds, report: Report) -> None:
    """One task in every round by everybody who can do it; who fails is out of `running`."""
    names = [name for name, (_, measures) in running.items() if task.measure in measures]
    more = {"tokens": rounds.facts[OURS]["picture_tokens"]} if task.measure == "picture" else {}
    if task.measure in WITH_TOWER:
        exported = task.tower or rounds.chosen_tower
        rounds.towers |= {(task.title, name): CONTESTANTS[name].tower.format(exported) for name in names}
    for number, name in turns(names, options.rounds, task.title, report):
        time.sleep(PAUSE_SECONDS)
        try:
            seconds = running[name][0].ask(task.name, **task.arguments, **more)["seconds"]
        except BrokenCheckpoint as error:
            rounds.drop(name, error, report)
            names.remove(name)
            del running[name]
            continue
        if number:
            rounds.add(task.title, task.unit, name, task.value(seconds))


def turns(names: list[str], rounds: int, stage: str, report: Report) -> Iterator[tuple[int, str]]:
    """(round, name) for all names in turn, round 0 as a warm-up; names may be removed meanwhile."""
    for number in range(rounds + 1):
        for name in list(names):
            yield number, name
        report(Event(stage, number, rounds))
