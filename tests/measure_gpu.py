"""Speed and memory on a GPU, printed as rows for tests/gpu/RESULTS.md. Not a test: numbers, no verdict.

    PYTHONPATH=. python tests/measure_gpu.py kernels [--bits 4 8] [--tokens 1 2 4 8]
    PYTHONPATH=. python tests/measure_gpu.py chat BUNDLE [--tiles 13] [--context 8192] [--limit-gb 11]

kernels: microseconds of one matrix times few tokens, every shape of the family, and its share of the bandwidth that copying
reaches on the same card. Matrices take turns so that none is found in the cache. chat: tokens/s and the memory that the
driver reports, with a picture of so many tiles in a prompt of so many tokens.
"""

import argparse
import statistics
import threading

import torch
from PIL import Image

from vlquant.runtime import Generation, load
from vlquant.runtime.cuda_linear import make_cuda_linear, with_int8_activations
from vlquant.runtime.linear import Workspace
from vlquant.runtime.reader import require_device

from tests.gptq_forms import FAMILY_SHAPES, random_tensors

BEYOND_CACHE = 256 * 2**20
"""Bytes of different matrices to go round: more than any card's second-level cache."""
RUNS = 30
MADE_UP_BYTES = 512 * 2**20


def microseconds(work, repeats: int = RUNS) -> float:
    """Median of single runs, by the device's own clock."""
    times = []
    for run in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work(run)
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes together."""
    source, target = torch.empty(2, MADE_UP_BYTES, dtype=torch.uint8, device="cuda")
    return 2 * MADE_UP_BYTES / microseconds(lambda run: target.copy_(source)) * 1e6


def bytes_read(linear) -> int:
    weight = linear.weight
    return sum(each.nbytes for each in (weight.codes, weight.scales, weight.offsets) if each is not None)


def measure_kernels(bits: list[int], tokens: list[int]) -> None:
    reachable = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copying moves {reachable / 1e9:.0f} GB/s; torch {torch.__version__}")
    print("bits  out x in          tokens  exact us  share  int8 us  share")
    for width in bits:
        for shape in FAMILY_SHAPES:
            first = make_cuda_linear(random_tensors(shape, width), workspace=Workspace("cuda"))
            copies = max(1, BEYOND_CACHE // bytes_read(first))
            linears = [first, *(make_cuda_linear(random_tensors(shape, width), workspace=Workspace("cuda")) for _ in range(min(copies, 63)))]
            rounded = [with_int8_activations(each) for each in linears]
            for count in tokens:
                x = torch.randn(count, shape[1], device="cuda")
                cells = []
                for some in (linears, rounded):
                    time = graph_microseconds(some, x)
                    cells += [f"{time:8.1f}", f"{bytes_read(first) / time * 1e6 / reachable:6.1%}"]
                print(f"{width:4d}  {shape[0]:6d} x {shape[1]:6d}  {count:6d}  {'  '.join(cells)}", flush=True)


def graph_microseconds(linears, x) -> float:
    """Time of one linear within a captured round through all, as decoding replays them."""
    for each in linears[:3]:
        each(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in linears:
            each(x)
    return microseconds(lambda run: graph.replay()) / len(linears)


class MostMemory(threading.Thread):
    """The most memory in use on the device, as the driver reports it: all processes, contexts and libraries included."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.finished = 0, threading.Event()

    def run(self):
        while not self.finished.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            self.most = max(self.most, total - free)


def measure_chat(bundle: str, tiles: int, context: int, limit_gb: float | None) -> None:
    if limit_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 1e9 / total))
    watch = MostMemory()
    watch.start()
    pipe = load(bundle, "cuda", max_tiles=tiles - 1)  # and the thumbnail
    side = pipe.config.chat.image_size
    picture = Image.effect_noise((side * tiles, side), 64).convert("RGB")
    words = "word " * max(0, context - 256 * tiles - 300)
    for run in range(3):
        answer = pipe.ask(f"{words}\nDescribe it.", images=[picture], generation=Generation(max_new_tokens=128))
        usage = answer.usage
        speed = usage.answer_tokens / max(usage.answer_seconds, 1e-9)
        print(
            f"run {run}: {sum(answer.tiles)} tiles, {usage.prompt_tokens} tokens; vision {usage.vision_seconds:.2f} s, "
            f"first token {usage.prompt_seconds:.2f} s, {speed:.1f} tokens/s; most memory in use {watch.most / 1e9:.2f} GB",
            flush=True,
        )
    watch.finished.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    kernels = verbs.add_parser("kernels")
    kernels.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    kernels.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    chat = verbs.add_parser("chat")
    chat.add_argument("bundle")
    chat.add_argument("--tiles", type=int, default=13)
    chat.add_argument("--context", type=int, default=8192)
    chat.add_argument("--limit-gb", type=float)
    given = parser.parse_args()
    require_device("cuda")
    with torch.inference_mode():
        if given.verb == "kernels":
            measure_kernels(given.bits, given.tokens)
        else:
            measure_chat(given.bundle, given.tiles, given.context, given.limit_gb)


if __name__ == "__main__":
    main()
