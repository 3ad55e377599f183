"""Quantize InternVL language models, export their vision towers, check what it cost, and chat."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout export/, runtime/ and calib_data/ lie beside this package; in a wheel they lie inside it.
if not (Path(__file__).parent / "export").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
