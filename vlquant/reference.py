"""The checkpoint that a bundle was made from: found on this machine, never fetched, and told from any other."""

from pathlib import Path

from vlquant.bundle import Manifest
from vlquant.calib_data import demo_model
from vlquant.errors import InvalidRequest, VlquantError
from vlquant.model import resolve_model
from vlquant.shards import file_hash

def find_reference(manifest: Manifest, named: str | Path | None, *, beside: Path) -> Path:
    """The folder of the checkpoint that the bundle in `beside` was made from.

    Raises InvalidRequest if `named` is another one, or if there is none of its name here, beside the bundle or among
    earlier downloads: nothing is fetched that was not asked for.
    """
    folder = resolve_model(named) if named is not None else find_source(manifest.source.name, beside)
    for name, expected in manifest.source.files.items():
        path = folder / name
        if not path.is_file() or file_hash(path) != expected:
            raise InvalidRequest(
                f"{folder} is not the checkpoint {manifest.name} was made from, for its {name} differs; "
                "name the right one with --reference, or quantize again"
            )
    return folder


def find_source(name: str, beside: Path) -> Path:
    """The folder of the model `name` if it is on this machine; raises InvalidRequest if it is not."""
    demo = demo_model()
    if name == demo.name:
        return demo
    sibling = beside.resolve().parent / name
    try:
        return sibling if sibling.is_dir() else resolve_model(name, network=False)
    except VlquantError:
        raise InvalidRequest(f"{name}, which the bundle was made from, is not here; name its folder with --reference") from None
