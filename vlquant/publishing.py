"""Put a folder in its place whole or not at all: written hidden beside it, flushed, renamed at the end.

Knows no contents except how to tell a bundle, which may be replaced, from somebody else's folder, which may not.
"""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlquant.bundle import MANIFEST
from vlquant.errors import NO_SPACE, OutputRefused

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed runs then stay where they are
    fcntl = None

HIDDEN_SUFFIX = ".partial"


def require_replaceable(output: Path, *, overwrite: bool) -> None:
    """Raise OutputRefused unless `output` is free, empty, or a bundle that may be overwritten."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise OutputRefused(f"{output} exists and is not a folder; choose another one with -o")
    if not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise OutputRefused(
            f"{output} exists and is not a bundle; choose another folder with -o (--overwrite replaces bundles only)"
        )
    if not overwrite:
        raise OutputRefused(
            f"{output} holds a bundle with another recipe, source or calibration data, or an incomplete one; "
            "add --overwrite to replace it, or choose another folder with -o"
        )


def require_empty(output: Path) -> None:
    """Raise OutputRefused unless `output` is free or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputRefused(f"{output} exists and is not an empty folder; name another one")


def require_space(output: Path, needed_bytes: int) -> None:
    """Raise OutputRefused if nothing can be written where `output` is to be, or its disk has less than `needed_bytes` free."""
    parent = next(folder for folder in output.resolve().parents if folder.is_dir())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:  # What is read-only, or no disk at all, often has no room either: making some would not help.
        if error.errno not in NO_SPACE:
            raise OutputRefused(f"{output} cannot be written ({error.strerror}); choose another folder with -o") from error
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputRefused(
            f"{output} needs {in_words(needed_bytes)} and its disk has {in_words(free)} free; "
            "make room or choose another disk with -o"
        )


def in_words(count: int) -> str:
    """A number of bytes in GB, in MB where that would be 0.0."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextmanager
def publishing(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` to write into; it becomes `output` at the end, or disappears on any failure.

    Whatever `output` held before is replaced; of a link, what it leads to. Raises OutputRefused if the disk is full or
    cannot be written, or if `output` is a folder that cannot be renamed.
    """
    place = output.resolve()
    require_renamable(output)
    hidden = _hidden_folder(place)
    lock = lock_folder(hidden)
    try:
        yield hidden
        _flush_to_disk(hidden)
        _replace(hidden, place)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OutputRefused(
            f"{output} could not be written because there is no space left; make room or choose another disk with -o"
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def require_renamable(output: Path) -> None:
    """Raise OutputRefused now rather than after hours: what exists at `output` is renamed at the end."""
    place = output.resolve()
    if place.is_dir() and (Path.cwd().is_relative_to(place) or place.is_mount()):
        raise OutputRefused(
            f"{output} is the current folder, holds it, or is the root of a disk, and cannot be replaced as a whole; "
            "name a new folder in it with -o"
        )


def is_partial(path: Path) -> bool:
    """Whether a path leads through what somebody is still writing, or was killed while writing."""
    return any(part.endswith(HIDDEN_SUFFIX) for part in path.parts)


def _hidden_folder(output: Path) -> Path:
    """A new hidden folder beside `output`, after clearing away those of killed runs."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sweep(output)
        hidden = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=HIDDEN_SUFFIX, dir=output.parent))
        hidden.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        return hidden
    except OSError as error:
        raise OutputRefused(
            f"{output} cannot be written ({error.strerror}); choose another folder with -o"
        ) from error


def sweep(output: Path) -> None:
    """Remove hidden folders that killed runs left beside `output`; those of running ones are locked.

    Raises OutputRefused for a place that the system does not let us look into.
    """
    try:
        output.exists()
    except OSError as error:
        raise OutputRefused(f"{output} cannot be written ({error.strerror}); choose another folder with -o") from error
    place = output.resolve()
    for stale in hidden_beside(place):
        with suppress(OSError):  # Another process may sweep too; what nobody may remove stays.
            if (lock := lock_folder(stale)) is not None:
                _remove(stale, place, lock)


def hidden_beside(place: Path) -> list[Path]:
    """What was or is being written for one file or folder: `tempfile` puts eight characters between name and suffix."""
    return list(place.parent.glob(f".{glob.escape(place.name)}.{'?' * 8}{HIDDEN_SUFFIX}"))


def _remove(stale: Path, output: Path, lock: int) -> None:
    """Remove a hidden folder that we locked, after giving back the one that `_replace` had moved into it when it was killed."""
    try:
        if (stale / output.name).is_dir() and not output.exists():
            (stale / output.name).rename(output)
        shutil.rmtree(stale, ignore_errors=True)
    finally:
        os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder, or a file, for the life of this process; None if another process has done so."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _replace(hidden: Path, output: Path) -> None:
    """Rename `hidden` to `output`, moving an older folder out of the way first."""
    older = lock = None
    if output.exists():
        older = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=HIDDEN_SUFFIX, dir=output.parent))
        try:
            lock = lock_folder(older)  # Another process that sweeps would give the older one back.
            output.rename(older / output.name)
        except OSError as error:
            older.rmdir()
            raise OutputRefused(f"{output} cannot be replaced ({error.strerror}); choose another folder with -o") from error
    hidden.rename(output)
    flush_entry(output.parent)
    if older is not None:
        shutil.rmtree(older, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flush_to_disk(folder: Path) -> None:
    """Make every file and folder below `folder` survive a power failure."""
    for path in (*folder.rglob("*"), folder):
        flush_entry(path)


def flush_entry(path: Path) -> None:
    """Make one file, or the names in one folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, and its folder, so that it is there whole or not at all; raises OutputRefused if that fails."""
    try:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise OutputRefused(f"{path} cannot be written ({error.strerror}); make room, or check its folder's rights") from error


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step that survives a power failure; raises OSError, and then nothing is left of it."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, data: bytes) -> None:
    """The same for any file."""
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new hidden file beside `path` to write into; it becomes `path` at the end, or disappears on any failure.

    Its name is nobody else's: another process may write the same file. What killed processes left is swept.
    """
    for stale in hidden_beside(path):
        with suppress(OSError):  # Another process may sweep too, or be done.
            if (lock := lock_folder(stale)) is not None:
                stale.unlink(missing_ok=True)
                os.close(lock)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=HIDDEN_SUFFIX, dir=path.parent)
    partial, lock = Path(name), None
    os.close(handle)
    try:
        with suppress(OSError):  # Where there are no locks, nobody can sweep either.
            lock = lock_folder(partial)
        yield partial
        partial.chmod(0o666 & ~_umask())  # mkstemp makes it private
        flush_entry(partial)
        partial.replace(path)
        flush_entry(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)
