"""Is the exported graph the same network? ONNX Runtime against torch on real tiles.

Knows a graph file and the tensors it was made from; decides nothing about folders.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import Tensor

from vlquant.calib_data.samples import samples
from vlquant.config import ModelConfig
from vlquant.errors import VlquantError
from vlquant.events import Event, Report, silent
from vlquant.export.graph import GRAPH_FILE, split_stages
from vlquant.runtime.vision_session import open_session
from vlquant.tiling import cut_tiles, normalize
from vlquant.vision import vision_stages

TILES = 4
BATCHES = (3, 1)  # several tiles and a single one: the tile axis must be free

# Float32 through 24 to 45 layers in another order of additions differs by 1e-6 to 1e-5 of the largest feature;
# the smallest mistake we could make, GELU by tanh, by 1e-4 and more.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """How far the exported graph is from torch."""

    largest_difference: float
    """Largest absolute difference of any feature."""
    feature_scale: float
    """Largest absolute feature of the torch tower."""
    tiles: int
    """Tiles compared."""
    tolerance: float = TOLERANCE
    """Largest difference accepted, as a share of feature_scale."""

    def __str__(self) -> str:
        return (
            f"largest difference from torch {self.largest_difference:.2g} on {self.tiles} tiles,"
            f" where features reach {self.feature_scale:.3g}"
        )

    @property
    def accepted(self) -> bool:
        """False too if any feature is not finite: a comparison with NaN is false."""
        return self.largest_difference <= self.tolerance * self.feature_scale < float("inf")


@torch.inference_mode()
def verify(folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, *, report: Report = silent) -> Parity:
    """Compare the graph in `folder` with torch on tiles of drawn pictures, stage by stage on either side.

    weights: what the graph was built from; asked for one by one. No more than one layer is in memory at a time.
    Raises VlquantError if a feature is not finite or the difference is beyond the tolerance.
    """
    open_session(folder / GRAPH_FILE, torch.device("cpu"), repack=False)  # That the whole of it loads; it takes no memory.
    expected = actual = real_tiles(config, TILES)
    stages = vision_stages(config.vision)
    for index, (in_torch, in_onnx) in enumerate(zip(stages, onnx_stages(folder), strict=True)):
        expected, actual = in_torch(expected, weights), in_onnx(actual)
        report(Event("comparison", index + 1, len(stages)))
    parity = compare(expected, actual)
    if not parity.accepted:
        raise VlquantError(
            f"the exported vision tower is refused ({parity}; accepted: {TOLERANCE:g} of that) and nothing was"
            " written; check the weights for values that are not finite, or use the torch vision tower"
        )
    return parity


def compare(expected: Tensor, actual: Tensor) -> Parity:
    """Parity of two [tiles, tokens, feature_size] tensors; not finite where either is not."""
    difference = (expected - actual).abs().max().item()
    return Parity(difference, expected.abs().max().item(), len(expected))


def real_tiles(config: ModelConfig, count: int) -> Tensor:
    """Normalized tiles [count, 3, side, side], at most two from each picture of the calibration set."""
    chat, tiles = config.chat, []
    tiling = {"max_tiles": chat.max_tiles, "image_size": chat.image_size, "use_thumbnail": chat.use_thumbnail}
    for sample in samples("calibration", count * 2):
        for image in sample.images:
            tiles += cut_tiles(image, **tiling)[:2]
    return normalize(tiles[:count])


def onnx_stages(folder: Path) -> Iterator[Callable[[Tensor], Tensor]]:
    """The graph in `folder` in its stages, each run by ONNX Runtime in the batches of BATCHES."""
    path = folder / "stage.onnx"  # Beside the weight file, which its tensors name by a relative path.
    try:
        for stage in split_stages(onnx.load(folder / GRAPH_FILE, load_external_data=False)):
            path.write_bytes(stage.SerializeToString())
            yield partial(run_stage, path)
    finally:
        path.unlink(missing_ok=True)


def run_stage(path: Path, hidden: Tensor) -> Tensor:
    """Output of a graph with one input and one output."""
    session = open_session(path, torch.device("cpu"), repack=False)  # Weights stay in the mapped file.
    (source,), (target,) = ([end.name for end in ends] for ends in (session.get_inputs(), session.get_outputs()))
    outputs = [session.run([target], {source: batch.numpy()})[0] for batch in hidden.split(BATCHES)]
    return torch.cat([torch.from_numpy(output) for output in outputs])
