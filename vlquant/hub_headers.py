"""What a checkpoint on the hub is made of, without its weights: configuration files, and the headers of its safetensors by range requests."""

import json
from pathlib import Path

from vlquant.checkpoint import INDEX_FILE, SINGLE_FILE, read_json
from vlquant.config import CONFIG_FILE, MANIFEST_FILE
from vlquant.errors import BrokenCheckpoint, MissingDependency, VlquantError

OPTIONAL_FILES = (MANIFEST_FILE, "preprocessor_config.json", "processor_config.json")
"""Small ones that say more about some checkpoints; all of them together are kilobytes."""


def fetch_headers(hub_id: str, folder: Path) -> None:
    """Make `folder` a checkpoint whose safetensors end after their headers: what `open_model` needs without `whole`.

    hub_id: "owner/name". Nothing enters the hub's cache, where half a checkpoint would be taken for a download.
    Raises BrokenCheckpoint if the hub cannot be reached, or holds no such model in safetensors; MissingDependency.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependency(
            f"{hub_id} is not a folder here, and asking the hub needs huggingface_hub; run `pip install huggingface_hub`"
        ) from None
    hub = huggingface_hub.HfApi()
    try:
        # Asking whether a file exists fails at once without a network; fetching it would try for half a minute.
        for name in (CONFIG_FILE, *OPTIONAL_FILES, INDEX_FILE):
            if hub.file_exists(hub_id, name):
                hub.hf_hub_download(hub_id, name, local_dir=folder)
            elif name == CONFIG_FILE:
                raise BrokenCheckpoint(f"the hub has no {CONFIG_FILE} of {hub_id}; check the name, or give a folder")
        for shard in shard_names(folder):
            write_header(folder / shard, hub.parse_safetensors_file_metadata(hub_id, shard).tensors)
    except VlquantError:
        raise
    except Exception as error:  # Beside the hub's own errors, those of whichever HTTP library its version uses.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BrokenCheckpoint(
            f"the hub does not tell what {hub_id} is made of ({reason}); check name and network, or give a folder"
        ) from error


def shard_names(folder: Path) -> list[str]:
    """The safetensors files of a checkpoint, told by its index. Raises BrokenCheckpoint for an index that names none."""
    if not (folder / INDEX_FILE).exists():
        return [SINGLE_FILE]
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BrokenCheckpoint(f"{folder / INDEX_FILE} has no weight_map; download it again")
    return sorted({Path(shard).name for shard in weight_map.values()})


def write_header(path: Path, tensors: dict) -> None:
    """Write a safetensors file that ends after its header; tensors: huggingface_hub's TensorInfo by name."""
    entries = {
        name: {"dtype": str(info.dtype), "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for name, info in tensors.items()
    }
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
