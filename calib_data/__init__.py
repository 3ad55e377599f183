"""Calibration and check sets, and the trained demo model."""

from pathlib import Path


def demo_model() -> Path:
    """Folder of the demo model that comes with the package, a checkpoint in the published layout."""
    return Path(__file__).parent / "vlquant-demo"
