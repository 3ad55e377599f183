"""The recordings in tests/golden, unpacked once per version into the test run's cache."""

import functools
import hashlib
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

PACKED = Path(__file__).parent / "golden"
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "golden"


@functools.cache
def golden_folder() -> Path:
    """Where the folders that golden/README.md describes are."""
    files = sorted(path for path in PACKED.rglob("*") if path.is_file())
    identity = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    folder = CACHE / identity
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Complete or absent, also when two test runs start at once.
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            unpack(Path(scratch) / "new")
            try:
                os.rename(Path(scratch) / "new", folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def unpack(folder: Path) -> None:
    """Everything in tests/golden, archives as the folders they hold."""
    shutil.copytree(PACKED, folder, ignore=shutil.ignore_patterns("*.tar.xz"))
    for archive in PACKED.glob("*.tar.xz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
