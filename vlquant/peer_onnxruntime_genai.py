"""onnxruntime-genai in `vlquant bench`: its own int4 model of the same shape, random weights, language model only.

What is measured imports nothing of ours that imports torch: its memory is measured too.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

os.environ.setdefault("ORT_GENAI_TELEMETRY_DISABLED", "1")  # Read when it is imported, as the next.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime_genai  # noqa: E402

from vlquant.bench_options import kept_model
from vlquant.errors import BrokenCheckpoint

QUANTIZING = {"block_size": "128", "accuracy_level": "4", "algo_config": "rtn_last"}
"""Groups as ours, inputs rounded to 8 bits, and by "last" a head in 8 bits."""
SETTINGS = "genai_config.json"


def place(settings: dict) -> Path:
    """Where the model of this shape is kept."""
    return kept_model(settings, "onnxruntime-genai", version=onnxruntime_genai.__version__, **QUANTIZING)


def prepare(settings: dict) -> dict:
    """Build the model unless it is there; what it is."""
    if not (place(settings) / SETTINGS).is_file():
        build_model(settings)
    bits = head_bits(place(settings))
    return {"precision": f"int4 {QUANTIZING}, head {'float' if bits is None else f'in {bits} bits'}"}


def build_model(settings: dict) -> None:
    """Float weights by transformers, the rest by onnxruntime-genai's builder."""
    from vlquant.config import read_config
    from vlquant.contestants import lack_of_memory
    from vlquant.layout import language_shapes
    from vlquant.publishing import publishing

    if reason := lack_of_memory(language_shapes(read_config(settings["bundle"]).decoder)):
        raise BrokenCheckpoint(f"onnxruntime-genai's model is built from a float one: {reason}; leave it out, or take a smaller model")
    options = [f"{name}={value}" for name, value in QUANTIZING.items()]
    with TemporaryDirectory(dir=settings["work"]) as scratch, publishing(place(settings)) as hidden:
        source = Path(scratch) / "float"
        write_float_model(source, Path(settings["bundle"]))
        command = ["-i", source, "-o", hidden, "-c", Path(scratch) / "cache", "-p", "int4", "-e", "cpu", "--extra_options", *options]
        run_builder([str(each) for each in command])


def run_builder(arguments: list[str]) -> None:
    """Run onnxruntime-genai's builder; raises BrokenCheckpoint with its last words if it fails."""
    done = subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments], capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BrokenCheckpoint(f"onnxruntime-genai's builder failed ({words[:200].rstrip('.')}); leave onnxruntime-genai out")


def write_float_model(folder: Path, bundle: Path) -> None:
    """A checkpoint of the language model alone, with the bundle's tokenizer, as the builder reads it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vlquant.config import read_config
    from vlquant.hf_layout import text_config
    from vlquant.tokenizer import load_tokenizer

    fields = text_config(read_config(bundle), load_tokenizer(bundle), "float32")
    # Scaled rope is another sum per position and no other speed; the builder knows few kinds.
    fields |= {"rope_scaling": None, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (bundle / name).is_file():
            (folder / name).write_bytes((bundle / name).read_bytes())


def head_bits(folder: Path) -> int | None:
    """Bits of the last matrix in a built model; None: it is float."""
    import onnx

    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    heads = [node for node in nodes if node.op_type == "MatMulNBits" and "lm_head" in node.name]
    return next((each.i for node in heads for each in node.attribute if each.name == "bits"), None)


def open_contestant(settings: dict) -> "Contestant":
    """The loaded model."""
    return Contestant(settings)


class Contestant:
    """Times are in seconds."""

    def __init__(self, settings: dict):
        self.genai, self.threads = onnxruntime_genai, settings["threads"]
        self.vocab_size, self.random = settings["vocab_size"], np.random.default_rng(0)
        started = time.perf_counter()
        config = onnxruntime_genai.Config(str(place(settings)))
        session = {"intra_op_num_threads": self.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)
        self.load_seconds = time.perf_counter() - started
        self._filled, self.generator = None, None

    def facts(self) -> dict:
        """What loading took, and what runs."""
        return {"load_seconds": self.load_seconds, "threads": self.threads}

    def text(self, tokens: int) -> float:
        """The first token after a prompt of `tokens`, its cache made for it."""
        started = time.perf_counter()
        self.open_generator(tokens + 2)
        self.run_prompt(tokens)
        self.generator.generate_next_token()
        return time.perf_counter() - started

    def prefill(self, length: int) -> float:
        """A prompt's logits and its next token."""
        self.open_generator(length + 2)
        started = time.perf_counter()
        self.run_prompt(length)
        self.generator.generate_next_token()
        return time.perf_counter() - started

    def decode(self, context: int, batch: int, tokens: int) -> float:
        """So many greedy tokens after a context, which is computed the first time. One sequence only."""
        if self._filled != (context, tokens):
            self.open_generator(context + tokens + 2)
            self.run_prompt(context)
            self._filled = context, tokens
        else:
            self.generator.rewind_to(context - 1)
            self.generator.append_tokens(np.zeros((1, 1), dtype=np.int32))
        self.generator.generate_next_token()  # Takes the token from the logits of the context; the next ones compute.
        started = time.perf_counter()
        for _ in range(tokens):
            self.generator.generate_next_token()
        return time.perf_counter() - started

    def open_generator(self, capacity: int) -> None:
        """A new, empty cache for so many positions."""
        self.generator, self._filled = None, None
        options = self.genai.GeneratorParams(self.model)
        options.set_search_options(max_length=capacity, min_length=capacity, do_sample=False, batch_size=1)
        self.generator = self.genai.Generator(self.model, options)

    def run_prompt(self, length: int) -> None:
        """Random tokens; logits for the last."""
        self.generator.append_tokens(self.random.integers(0, self.vocab_size, (1, length)).astype(np.int32))
