"""What float16 makes of a vision tower: whether its numbers fit, and what rounding them costs. Runs torch; knows no file.

A GPU multiplies float16 and adds in float32. ONNX Runtime on a CPU computes in float32 throughout, so that neither
overflow nor rounding show there.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vlquant.bundle import FLOAT16_ROOM
from vlquant.events import Event, Report, silent
from vlquant.vision import Stage, VisionConfig, vision_stages

NARROWED = {F.linear, F.gelu, F.scaled_dot_product_attention}
"""What the branches between norms and residual stream consist of."""
ALWAYS_FLOAT32 = "vision_tower.embeddings."
"""The one linear that is in no branch."""


@torch.inference_mode()
def largest_values(pixels: Tensor, weights: Mapping[str, Tensor], config: VisionConfig, *, report: Report = silent) -> dict[str, float]:
    """The largest absolute value in each branch of the network for `pixels` [tiles, 3, side, side]; infinite: not finite.

    Weights, inputs and outputs of every linear, activation and attention, attention scores (at most) included. Branches
    are called by what the names of their weights start with. One layer of `weights` is in memory at a time.
    """
    asked = Asked(weights)
    watch, hidden, stages = Watch(asked), pixels, vision_stages(config)
    for index, stage in enumerate(stages):
        with watch:
            hidden = stage(hidden, asked)
        report(Event("range scan", index + 1, len(stages)))
    return watch.largest


def too_large(largest: Mapping[str, float]) -> tuple[str, ...]:
    """The branches that float16 cannot hold with room to spare."""
    return tuple(branch for branch, value in largest.items() if not value <= FLOAT16_ROOM)


class Asked(Mapping):
    """Weights that remember whose were asked for last, by which torch's calls are told apart."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights, self.branch = weights, ""

    def __getitem__(self, name: str) -> Tensor:
        self.branch = name.rsplit(".", 2)[0] + "."
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class Watch(TorchFunctionMode):
    """While it is entered, notes the largest values of what torch computes for the branch whose weights were asked for."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.largest: dict[str, float] = {}
        self._asked = asked

    def __torch_function__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        branch = self._asked.branch
        if function in NARROWED and not branch.startswith(ALWAYS_FLOAT32):
            found = [magnitude(each) for each in (*arguments, result) if isinstance(each, Tensor)]
            if function is F.scaled_dot_product_attention:
                found.append(largest_score(arguments))
            self.largest[branch] = max(self.largest.get(branch, 0.0), *found)
        return result


def rounded_stages(weights: Mapping[str, Tensor], config: VisionConfig, islands: Collection[str]) -> Iterator[Stage]:
    """The stages of the network with inputs, weights and results of all but `islands` rounded to float16.

    Called like those of `vision_stages`, with no weights but `weights`.
    """
    asked = Asked(weights)
    rounding = Rounding(asked, (ALWAYS_FLOAT32, *islands))

    def rounded(stage: Stage, hidden: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        with rounding:
            return stage(hidden, asked)

    return (partial(rounded, stage) for stage in vision_stages(config))


class Rounding(TorchFunctionMode):
    """While it is entered, torch's calls for all but some branches round to float16 what they are given and what they give."""

    def __init__(self, asked: Asked, kept: tuple[str, ...]) -> None:
        super().__init__()
        self._asked, self._kept = asked, kept

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function not in NARROWED or self._asked.branch.startswith(self._kept):
            return function(*arguments, **(named or {}))
        rounded = [each.half().float() if isinstance(each, Tensor) else each for each in arguments]
        return function(*rounded, **(named or {})).half().float()


def magnitude(tensor: Tensor) -> float:
    """The largest absolute value; infinite if one is not finite."""
    largest = tensor.abs().max().item()
    return largest if largest < float("inf") else float("inf")  # NaN is not smaller than anything.


def largest_score(heads: Sequence[Tensor]) -> float:
    """What no attention score of queries and keys [tiles, heads, tokens, head_dim] is beyond: a product of their lengths."""
    queries, keys = (magnitude(each.norm(dim=-1)) for each in heads[:2])
    return queries * keys / heads[0].shape[-1] ** 0.5
