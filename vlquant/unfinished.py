"""The working folder of a quantization: finished layers outlive whatever stops it, and the same command goes on after them.

Knows the files of a run and what it was started with; nothing of models.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from vlquant.bundle import LayerRange, ModuleRecord
from vlquant.calibrate import CLASSES_FILE
from vlquant.errors import (
    NO_SPACE,
    BrokenCheckpoint,
    InvalidRecipe,
    InvalidRequest,
    MissingDependency,
    OutputRefused,
    UnsupportedCheckpoint,
)
from vlquant.events import Event, Report, silent
from vlquant.publishing import flush_entry, lock_folder, replace_text
from vlquant.quantized_layers import QuantizedLayer
from vlquant.shards import write_safetensors

SETTINGS = "started-with.json"
RECORDS, RANGE = "records", "range"
ANSWERS = "answers.json"
HOPELESS = (BrokenCheckpoint, InvalidRecipe, InvalidRequest, MissingDependency, UnsupportedCheckpoint)
"""Repeating the same command would end in the same way."""


class UnfinishedRun:
    """Layers quantized so far, one file each, every one of them whole."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def layers(self) -> int:
        """How many layers are finished; they are always the first ones."""
        count = 0
        while self._part(count).exists():
            count += 1
        return count

    @property
    def answers(self) -> Path:
        """The file of answers to calibrate on that the reference has written so far."""
        return self.folder / ANSWERS

    @property
    def worth_keeping(self) -> bool:
        """Whether there is anything that takes long to make."""
        return self.layers > 0 or self.answers.exists() or (self.folder / CLASSES_FILE).exists()

    def keep(self, index: int, layer: QuantizedLayer) -> None:
        """Write one layer so that it survives a loss of power."""
        records = json.dumps([record.model_dump() for record in layer.records])
        metadata = {RECORDS: records} if layer.range is None else {RECORDS: records, RANGE: layer.range.model_dump_json()}
        partial = self._part(index).with_suffix(".partial")
        write_safetensors(partial, layer.tensors, metadata=metadata)
        flush_entry(partial)
        partial.rename(self._part(index))
        flush_entry(self.folder)

    def layer(self, index: int) -> QuantizedLayer:
        """A finished layer."""
        with safe_open(self._part(index), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        records = [ModuleRecord.model_validate(record) for record in json.loads(metadata[RECORDS])]
        return QuantizedLayer(tensors, records, LayerRange.model_validate_json(metadata[RANGE]) if RANGE in metadata else None)

    def _part(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"


def working_folder(output: Path) -> Path:
    """Where a run that is to become `output` keeps its files."""
    place = output.resolve()
    return place.with_name(f".{place.name}.unfinished")


def bytes_so_far(output: Path) -> int:
    """What an interrupted run for `output` has written already."""
    return sum(path.stat().st_size for path in working_folder(output).glob("*") if path.is_file())


def forget_finished(output: Path) -> None:
    """Remove what a run left behind that was killed after its bundle had been put in place, unless another one uses it."""
    folder = working_folder(output)
    lock = lock_folder(folder) if folder.is_dir() else None
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def resuming(output: Path, settings: dict, *, overwrite: bool, report: Report = silent) -> Iterator[UnfinishedRun]:
    """The run that is to become `output`: an interrupted one with the same settings goes on, else a new one begins.

    It is removed when all is done, on a failure before anything worth keeping was finished, and when the request turns out to be
    one that cannot be carried out. report: is told what is kept when somebody presses Ctrl-C. Raises OutputRefused for an
    interrupted run with other settings, naming the difference, unless it may be overwritten.
    """
    folder = working_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flush_entry(folder.parent)
    except OSError as error:
        raise OutputRefused(f"{output} cannot be written ({error.strerror}); choose another folder with -o") from error
    lock = lock_folder(folder)
    if lock is None and os.name == "posix":
        raise OutputRefused(f"{output} is being written by another vlquant; wait for it, or choose another folder with -o")
    run = UnfinishedRun(folder)
    try:
        begin(run, output, settings, overwrite=overwrite)
        yield run
        shutil.rmtree(folder)
    except (OSError, OutputRefused) as error:
        cause = error.__cause__ if isinstance(error, OutputRefused) else error  # Publishing has said it in its own words.
        if not isinstance(cause, OSError) or cause.errno not in NO_SPACE:
            raise
        raise OutputRefused(f"{output} could not be written because there is no space left; {way_out(run)}") from error
    except (KeyboardInterrupt, SystemExit):
        if run.worth_keeping:
            report(Event("quantize", message=f"interrupted; what is finished is kept: {next_time(run)}"))
        raise
    except HOPELESS:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if not run.worth_keeping:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def begin(run: UnfinishedRun, output: Path, settings: dict, *, overwrite: bool) -> None:
    """Note what the run is started with, or compare that with what it was started with."""
    path = run.folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    if before != settings:
        if not overwrite and run.worth_keeping:
            raise OutputRefused(
                f"an interrupted run for {output} was started with {difference(before, settings)}; "
                "repeat that command to finish it, or add --overwrite to begin anew"
            )
        for each in run.folder.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    if not path.exists():
        replace_text(path, json.dumps(settings, indent=2))


def difference(before: object, now: object, name: str = "") -> str:
    """The first entry in which two settings differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
        return difference(before.get(key), now.get(key), f"{name} {key}".strip())
    return f"{name} {before}, now {now}"


def way_out(run: UnfinishedRun) -> str:
    """What to do about a full disk."""
    return f"make room and {next_time(run)}" if run.worth_keeping else "make room or choose another disk with -o"


def next_time(run: UnfinishedRun) -> str:
    """How a run that has something goes on."""
    where = f"after layer {run.layers}" if run.layers else "with the calibration data it has"
    return f"repeat the command, which goes on {where}"
