"""Is the exported graph the same network? ONNX Runtime against torch on real tiles.

Knows a graph file and the tensors it was made from; decides nothing about folders.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from vlquant.calib_data.samples import samples
from vlquant.config import ModelConfig
from vlquant.errors import VlquantError
from vlquant.events import Event, Report, silent
from vlquant.export.float16 import rounded_stages
from vlquant.export.graph import split_stages
from vlquant.runtime.vision_session import open_session
from vlquant.tiling import cut_tiles, normalize
from vlquant.vision import Stage, vision_stages
from vlquant.vision_manifest import ACCEPTED, GRAPH_FILE, Accepted

TILES = 4
BATCHES = (3, 1)  # several tiles and a single one: the tile axis must be free


@dataclass(frozen=True)
class Parity:
    """How far the exported graph is from torch."""

    largest_difference: float
    """Largest absolute difference of any feature."""
    feature_scale: float
    """Largest absolute feature of the torch tower."""
    tiles: int
    """Tiles compared."""
    cosine: float
    """Between both features of the worst tile."""
    tolerance: float
    """Largest difference accepted, as a share of feature_scale."""
    least_cosine: float
    """Least cosine accepted."""

    def __str__(self) -> str:
        return (
            f"largest difference from torch {self.largest_difference:.2g} on {self.tiles} tiles,"
            f" where features reach {self.feature_scale:.3g}, cosine of the worst {self.cosine:.6f}"
        )

    @property
    def accepted(self) -> bool:
        """False too if any feature is not finite: a comparison with NaN is false."""
        near = self.largest_difference <= self.tolerance * self.feature_scale < float("inf")
        return near and self.cosine >= self.least_cosine


@torch.inference_mode()
def verify(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    precision: str = "fp32",
    islands: Collection[str] = (),
    report: Report = silent,
) -> Parity:
    """Compare the graph in `folder` with torch in float32 on tiles of drawn pictures, stage by stage on either side.

    weights: what the graph was built from; asked for one by one. No more than one layer is in memory at a time.
    precision: a key of ACCEPTED; islands: what is float32 in float16, whose rounding is compared as well: the CPU that
    runs the graph computes in float32.
    Raises VlquantError if a feature is not finite or the graph is further away than accepted.
    """
    open_session(folder / GRAPH_FILE, torch.device("cpu"), repack=False)  # That the whole of it loads; it takes no memory.
    stages = vision_stages(config.vision)
    others = [onnx_stages(folder)]
    if precision == "fp16":
        others.append(rounded_stages(weights, config.vision, islands))
    expected = real_tiles(config, TILES)
    found = [expected] * len(others)
    for index, (in_torch, *elsewhere) in enumerate(zip(stages, *others, strict=True)):
        expected = in_torch(expected, weights)
        found = [stage(hidden, weights) for stage, hidden in zip(elsewhere, found, strict=True)]
        report(Event("comparison", index + 1, len(stages)))
    parities = [compare(expected, each, ACCEPTED[precision]) for each in found]
    parity = min(parities, key=lambda each: (each.accepted, -each.largest_difference))
    if not parity.accepted:
        narrow = "" if precision == "fp32" else ", export it with --precision fp32"
        raise VlquantError(
            f"the vision tower in {precision} is refused ({parity}; accepted: {parity.tolerance:g} of that, cosine "
            f"{parity.least_cosine:g}) and nothing was written; check the weights for values that are not finite{narrow}, "
            "or use the torch vision tower"
        )
    return parity


def compare(expected: Tensor, actual: Tensor, accepted: Accepted) -> Parity:
    """Parity of two [tiles, tokens, feature_size] tensors; not finite where either is not."""
    difference = (expected - actual).abs().max().item()
    pairs = (each.double().flatten(1) for each in (expected, actual))
    cosine = min(1.0, torch.cosine_similarity(*pairs).min().item())
    return Parity(difference, expected.abs().max().item(), len(expected), cosine, accepted.difference, accepted.cosine)


def real_tiles(config: ModelConfig, count: int) -> Tensor:
    """Normalized tiles [count, 3, side, side], at most two from each picture of the calibration set."""
    chat, tiles = config.chat, []
    tiling = {"max_tiles": chat.max_tiles, "image_size": chat.image_size, "use_thumbnail": chat.use_thumbnail}
    for sample in samples("calibration", count * 2):
        for image in sample.images:
            tiles += cut_tiles(image, **tiling)[:2]
    return normalize(tiles[:count])


def onnx_stages(folder: Path) -> Iterator[Stage]:
    """The graph in `folder` in its stages, each run by ONNX Runtime in the batches of BATCHES."""
    path = folder / "stage.onnx"  # Beside the weight file, which its tensors name by a relative path.
    try:
        for stage in split_stages(onnx.load(folder / GRAPH_FILE, load_external_data=False)):
            path.write_bytes(stage.SerializeToString())
            yield lambda hidden, _: run_stage(path, hidden)
    finally:
        path.unlink(missing_ok=True)


def run_stage(path: Path, hidden: Tensor) -> Tensor:
    """Output of a graph with one input and one output."""
    session = open_session(path, torch.device("cpu"), repack=False)  # Weights stay in the mapped file.
    (source,), (target,) = ([end.name for end in ends] for ends in (session.get_inputs(), session.get_outputs()))
    outputs = [session.run([target], {source: batch.numpy()})[0] for batch in hidden.split(BATCHES)]
    return torch.cat([torch.from_numpy(output) for output in outputs])
