"""llama.cpp in `vlquant bench`, through llama-cpp-python's low-level interface: same shape, random weights, language model only.

Imports nothing of ours that imports torch: its memory is measured.
"""

import ctypes
import time
from importlib import metadata
from pathlib import Path

import llama_cpp
import numpy as np

from vlquant.bench_options import kept_model, row_lengths
from vlquant.errors import InvalidRequest

MODEL = "model.gguf"
PRECISION = "Q4_0, embedding and head Q8_0"
"""As gguf_shape.py writes it."""
BATCH, MICRO_BATCH = 2048, 512
"""Tokens of a call and of a graph: llama.cpp's defaults."""


def place(settings: dict) -> Path:
    """Where the model of this shape is kept."""
    return kept_model(settings, "llama-cpp", version=metadata.version("gguf"), precision=PRECISION)


def prepare(settings: dict) -> None:
    """Write the model unless it is there."""
    from vlquant.config import read_config
    from vlquant.gguf_shape import write_gguf
    from vlquant.publishing import publishing

    if not (place(settings) / MODEL).is_file():
        with publishing(place(settings)) as hidden:
            write_gguf(hidden / MODEL, read_config(settings["bundle"]))


def open_contestant(settings: dict) -> "Contestant":
    """The loaded model."""
    return Contestant(settings)


class Contestant:
    """Times are in seconds."""

    def __init__(self, settings: dict):
        self.threads, self.random = settings["threads"], np.random.default_rng(0)
        started = time.perf_counter()
        llama_cpp.llama_backend_init()
        path = place(settings) / MODEL
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise InvalidRequest(f"llama.cpp cannot load {path}; delete it and repeat, or leave llama-cpp out")
        self.load_seconds = time.perf_counter() - started
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.tokens = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.context, self._filled = None, None

    def facts(self) -> dict:
        """What loading took, and what runs."""
        system = llama_cpp.llama_print_system_info().decode().strip()
        return {"load_seconds": self.load_seconds, "precision": PRECISION, "system": system}

    def text(self, tokens: int) -> float:
        """The first token after a prompt of `tokens`, its context made for it."""
        started = time.perf_counter()
        self.open_context(tokens, 1)
        self.run_prompt(0, tokens)
        return time.perf_counter() - started

    def prefill(self, length: int) -> float:
        """A prompt's logits for its next token."""
        self.open_context(length, 1)
        started = time.perf_counter()
        self.run_prompt(0, length)
        return time.perf_counter() - started

    def decode(self, context: int, batch: int, tokens: int) -> float:
        """So many greedy tokens of every sequence after a context, which is computed the first time."""
        lengths = row_lengths(context, batch)
        if self._filled != (context, batch, tokens):
            self.open_context(context + tokens, batch)
            for sequence, length in enumerate(lengths):
                self.run_prompt(sequence, length)
            self._filled = context, batch, tokens
        memory = llama_cpp.llama_get_memory(self.context)
        for sequence, length in enumerate(lengths):
            llama_cpp.llama_memory_seq_rm(memory, sequence, length, -1)
        ids = [0] * batch
        started = time.perf_counter()
        for step in range(tokens):
            ids = self.run([(ids[row], lengths[row] + step, row, True) for row in range(batch)])
        return time.perf_counter() - started

    def open_context(self, positions: int, sequences: int) -> None:
        """A new, empty cache for so many positions of each sequence."""
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = positions * sequences, sequences
        options.n_batch, options.n_ubatch = BATCH, MICRO_BATCH
        options.n_threads = options.n_threads_batch = self.threads
        self.context, self._filled = llama_cpp.llama_init_from_model(self.model, options), None
        if not self.context:
            raise InvalidRequest(f"llama.cpp has no room for {positions * sequences} positions; take shorter contexts")

    def run_prompt(self, sequence: int, length: int) -> None:
        """Random tokens from position 0; logits for the last."""
        ids = self.random.integers(0, self.vocabulary, length).tolist()
        for start in range(0, length, BATCH):
            part = range(start, min(length, start + BATCH))
            self.run([(ids[position], position, sequence, position == length - 1) for position in part])

    def run(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Tokens as (id, position, sequence, whether its logits are wanted); the likeliest next ones of those."""
        batch = self.tokens
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        if code := llama_cpp.llama_decode(self.context, batch):
            raise InvalidRequest(f"llama.cpp could not compute {len(entries)} tokens (code {code}); leave llama-cpp out")
        return [self.likeliest(index) for index, entry in enumerate(entries) if entry[3]]

    def likeliest(self, index: int) -> int:
        """The token with the largest logit after a token of the last call."""
        logits = ctypes.cast(llama_cpp.llama_get_logits_ith(self.context, index), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())
