"""A bench that nobody ran."""

from dataclasses import replace

from vlquant.bench_options import BenchOptions
from vlquant.bench_result import BenchResult, Series
from vlquant.machine import Machine

SMALL = BenchOptions(rounds=2, prompts=(24,), contexts=(16,), batch=2, tokens=2, against=("torch", "transformers"))
MACHINE = Machine("A processor", 2, 2, ("avx2",), "Linux", 0.05, {"torch": "2"})


def made_up(**more):
    series = (
        Series("load", "s", "vlquant", (1.0, 3.0, 2.0)),
        Series("prefill 512", "tokens/s", "vlquant", (10.0, 20.0, 30.0, 40.0)),
        Series("prefill 512", "tokens/s", "llama-cpp", (5.0, 10.0, 15.0, 20.0)),
        Series("peak memory, text answered", "bytes", "vlquant", (1.5e9,)),
        Series("tile, float32", "s", "openvino", (2.0,), "float32 file"),
    )
    found = BenchResult("a-bundle", {"layers": 2}, "2026-01-02 03:04", SMALL, MACHINE, {"llama-cpp": {"system": "VNNI = 1"}}, series, {"openvino": "absent [here]"})
    return replace(found, **more)
