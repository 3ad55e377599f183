"""Who is measured by `vlquant bench`: ours and its peers, as data, and the process that each of them is."""

import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vlquant.config import ModelConfig
from vlquant.decoder_config import DecoderConfig
from vlquant.errors import BrokenCheckpoint, InvalidRequest, MissingDependency, VlquantError
from vlquant.hf_layout import inexpressible
from vlquant.layout import Shapes, tensor_shapes
from vlquant.machine import available_memory

GGUF_BLOCK = 32
"""Columns of one block of Q4_0 and Q8_0."""
WITHOUT_PHI3 = "bench writes no Phi-3 model for it, whose fused linears and long rope it computes otherwise"


@dataclass(frozen=True)
class Contestant:
    """What can be measured of one program."""

    module: str
    """Ours that runs it; its `open_contestant` takes the settings."""
    measures: frozenset[str]
    libraries: tuple[str, ...] = ()
    """What has to be importable."""
    install: str = ""
    prepares: bool = False
    """Whether it needs files of its own: its module has `prepare`."""
    tower: str = "{}"
    """Precision of the vision tower that it runs; {} is that of the exported one."""


CONTESTANTS = {
    "vlquant": Contestant("vlquant.contestant_vlquant", frozenset({"start", "vision", "prefill", "decode", "batch", "picture"})),
    "torch": Contestant("vlquant.contestant_torch", frozenset({"vision"}), tower="float32"),
    "transformers": Contestant(
        "vlquant.peer_transformers", frozenset({"vision", "prefill", "decode", "batch", "picture"}),
        ("transformers",), "pip install transformers", tower="float32",
    ),
    "llama-cpp": Contestant(
        "vlquant.peer_llama_cpp", frozenset({"start", "prefill", "decode", "batch"}),
        ("llama_cpp", "gguf"), "pip install llama-cpp-python gguf", prepares=True,
    ),
    "onnxruntime-genai": Contestant(
        "vlquant.peer_onnxruntime_genai", frozenset({"start", "prefill", "decode"}),
        ("onnxruntime_genai", "onnx_ir", "transformers"), "pip install onnxruntime-genai onnx_ir transformers", prepares=True,
    ),
    # It is told to compute in float32; what it makes of a file's integers is its own affair.
    "openvino": Contestant("vlquant.peer_openvino", frozenset({"vision"}), ("openvino",), "pip install openvino", tower="{} file"),
}  # fmt: skip
PEERS = tuple(name for name in CONTESTANTS if name != "vlquant")


def choose_peers(wanted: tuple[str, ...] | None, config: ModelConfig) -> tuple[list[str], dict[str, str]]:
    """The peers to measure, and why others are not; None: those that can run.

    Raises InvalidRequest or MissingDependency, which tells of all, if some that are named cannot.
    """
    if wanted is None:
        reasons = {name: str(error) for name in PEERS if (error := refusal(name, config))}
        return [name for name in PEERS if name not in reasons], reasons
    wanted = list(dict.fromkeys(wanted))
    if errors := [error for name in wanted if (error := refusal(name, config))]:
        raise type(errors[0])("; and ".join(map(str, errors)))
    return wanted, {}


def refusal(name: str, config: ModelConfig) -> VlquantError | None:
    """Why a peer cannot be measured with a model; None: it can."""
    if name not in PEERS:
        return InvalidRequest(f"there is no peer {name!r}; compare with {', '.join(PEERS)}")
    peer = CONTESTANTS[name]
    if absent := [each for each in peer.libraries if importlib.util.find_spec(each) is None]:
        return MissingDependency(f"{name} cannot be measured, {' and '.join(absent)} being absent; run {peer.install}")
    reason = unfit(name, config)
    return InvalidRequest(f"{name} cannot run this model: {reason}; leave it out of --against") if reason else None


def unfit(name: str, config: ModelConfig) -> str | None:
    """What in a model's architecture a peer cannot run here."""
    if name == "transformers":
        return inexpressible(config) or lack_of_memory(tensor_shapes(config))
    if name not in ("llama-cpp", "onnxruntime-genai"):
        return None
    if config.decoder.rope.long is not None:
        return WITHOUT_PHI3
    return uneven(config.decoder) if name == "llama-cpp" else None


def lack_of_memory(shapes: Shapes) -> str | None:
    """Whether tensors in float32 would drive others out of memory, or end the process."""
    needed, free = 4 * sum(map(math.prod, shapes.values())), available_memory()
    if free is None or needed <= free:
        return None
    return f"its weights in float32 take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"


def uneven(decoder: DecoderConfig) -> str | None:
    """Whether the inputs of a linear are not whole blocks of GGUF."""
    widths = decoder.hidden_size, decoder.intermediate_size, decoder.heads * decoder.head_dim
    return f"its linears' inputs {widths} are not multiples of {GGUF_BLOCK}" if any(each % GGUF_BLOCK for each in widths) else None


class ContestantProcess:
    """A contestant in a process of its own: it waits for a line, measures, answers with a line."""

    def __init__(self, name: str, module: str, settings: Mapping, *, kernels: str | None = None):
        """Start it; `start_seconds` is what that took until its libraries were imported."""
        self.name = name
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])}
        if kernels:
            environment["VLQUANT_KERNELS"] = kernels
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vlquant.contestant", module, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8", env=environment,
        )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started

    def __enter__(self) -> "ContestantProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception) -> None:
        if kind is not None:  # Nobody waits for what it is measuring.
            self._process.terminate()
        self.close()

    def ask(self, task: str, **details) -> dict:
        """Have one thing done; what it took. Raises BrokenCheckpoint with the process's last words if it fails."""
        with suppress(BrokenPipeError):  # What it died of is read below.
            self._process.stdin.write(json.dumps({"task": task, **details}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            heard = json.loads(line)
            if "error" in heard:
                raise BrokenCheckpoint(heard["error"])
            return heard
        code = self._process.wait()
        self._log.seek(0)
        words = [each.strip() for each in self._log.read().splitlines() if each.strip()]
        reason = "it was killed, probably for want of memory" if code == -9 else words[-1] if words else f"exit code {code}"
        raise BrokenCheckpoint(f"the process that ran {self.name} ended ({reason[:300].rstrip('.')}); leave it out, or take a smaller model")

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):  # What it was told last and did not live to read.
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def settings_for(bundle: Path, work: Path, config: ModelConfig, threads: int) -> dict:
    """What a contestant has to know; peers learn it here, so that they need import nothing of ours that is large."""
    shape = hashlib.sha256(repr(config.decoder).encode()).hexdigest()[:12]
    sizes = {"vocab_size": config.decoder.vocab_size, "tile": config.vision.image_size}
    return {"bundle": str(bundle.resolve()), "work": str(work.resolve()), "threads": threads, "shape": shape, **sizes}
