"""What the CUDA kernels compute, in NumPy on the same packed words: for machines without a compiler.

Follows the kernels' index arithmetic (which chunk a lane takes, where its words, scales and inputs lie, in which order it
adds), lane by lane in the first axis of every array. Float32 throughout, as there.
"""

import numpy as np

from vlquant.runtime.cuda_driver import MAX_WARPS, WARP
from vlquant.runtime.cuda_layout import CHUNK, KernelWeight
from vlquant.runtime.cuda_linear import INPUT_BLOCK, ROWS

MAGIC = np.uint32(0x4B000000)
WORDS = {"4bit": 1, "8bit": 2, "float16": 4, "bfloat16": 4}


def half_byte(column: int) -> int:
    return 2 * (column & 3) + (column >> 2)


def code(kind: str, words: np.ndarray, column: int) -> np.ndarray:
    """Column `column` of chunks whose words are [..., words]; 4-bit codes times what `input_factor` takes off again."""
    if kind == "4bit":
        half_word = words[..., 0] >> np.uint32(16) if half_byte(column) & 4 else words[..., 0]
        shift = 4 * (half_byte(column) & 3)
        return ((half_word & np.uint32(15 << shift)) | MAGIC).view(np.float32) - np.float32(8388608 + (8 << shift))
    if kind == "8bit":
        byte = words[..., column >> 2] >> np.uint32(8 * (column & 3)) & np.uint32(255)
        return (byte | MAGIC).view(np.float32) - np.float32(8388608 + 128)
    pair = words[..., column >> 1]
    if kind == "bfloat16":
        return (pair & np.uint32(0xFFFF0000) if column & 1 else pair << np.uint32(16)).view(np.float32)
    return (pair >> np.uint32(16 * (column & 1))).astype(np.uint16).view(np.float16).astype(np.float32)


def input_factor(kind: str, column: int) -> np.float32:
    return np.float32(1 / (1 << 4 * (half_byte(column) & 3))) if kind == "4bit" else np.float32(1)


class Flat:
    """A weight as the addresses a kernel sees: one-dimensional arrays."""

    def __init__(self, weight: KernelWeight):
        self.kind, self.in_features, self.out_features = weight.kind, weight.in_features, weight.out_features
        self.words_per_chunk, self.chunks = WORDS[weight.kind], weight.in_features // CHUNK
        self.shift = weight.group_shift
        self.groups = ((self.chunks - 1) >> self.shift) + 1
        self.codes = weight.codes.numpy().view(np.uint32).reshape(-1)
        self.scales = None if weight.scales is None else weight.scales.numpy().reshape(-1)
        self.offsets = None if weight.offsets is None else weight.offsets.numpy().reshape(-1)

    def words(self, row: int, chunks: np.ndarray) -> np.ndarray:
        """[chunks, words]"""
        first = (row * self.chunks + chunks) * self.words_per_chunk
        return self.codes[first[:, None] + np.arange(self.words_per_chunk)]

    def group(self, row: int, chunks: np.ndarray) -> np.ndarray:
        return row * self.groups + (chunks >> self.shift)


def gemv(weight: KernelWeight, x: np.ndarray) -> np.ndarray:
    """float32 [tokens, in] -> [tokens, out], without bias and row scale."""
    flat, (tokens, _) = Flat(weight), x.shape
    warps = min(MAX_WARPS, -(-flat.chunks // WARP))
    y = np.full((tokens, flat.out_features), np.nan, np.float32)
    for block in range(-(-flat.out_features // ROWS)):
        for row in range(block * ROWS, min(block * ROWS + ROWS, flat.out_features)):
            sums = np.zeros((warps * WARP, tokens), np.float32)  # of every thread
            for start in range(0, flat.chunks, warps * WARP):
                chunks = np.arange(start, min(start + warps * WARP, flat.chunks))
                words, group = flat.words(row, chunks), flat.group(row, chunks)
                dots, input_sums = np.zeros((2, len(chunks), tokens), np.float32)
                for column in range(CHUNK):
                    inputs = x[:, chunks * CHUNK + column].T  # [chunks, tokens]
                    dots += code(flat.kind, words, column)[:, None] * (inputs * input_factor(flat.kind, column))
                    input_sums += inputs
                scale = 1 if flat.scales is None else flat.scales[group].astype(np.float32)[:, None]
                sums[: len(chunks)] += scale * dots
                if flat.offsets is not None:
                    sums[: len(chunks)] += flat.offsets[group][:, None] * input_sums
            y[:, row] = sums.reshape(warps, WARP, tokens).sum(axis=1).sum(axis=0)
    return y


def dequantize(weight: KernelWeight, dtype: type) -> np.ndarray:
    """The weight [out, in], each value rounded once."""
    flat = Flat(weight)
    out = np.zeros((flat.out_features, flat.in_features), dtype)
    chunks = np.arange(flat.chunks)
    for row in range(flat.out_features):
        words, group = flat.words(row, chunks), flat.group(row, chunks)
        offset = 0 if flat.offsets is None else flat.offsets[group]
        for column in range(CHUNK):
            value = code(flat.kind, words, column) * input_factor(flat.kind, column)
            out[row, chunks * CHUNK + column] = flat.scales[group].astype(np.float32) * value + offset
    return out


def round_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [tokens, in] and float32 scales [tokens, in / 32]."""
    blocks = x.reshape(len(x), -1, INPUT_BLOCK)
    scales = np.abs(blocks).max(axis=2) / np.float32(127)
    codes = np.rint(np.divide(blocks, scales[..., None], out=np.zeros_like(blocks), where=scales[..., None] > 0))
    return codes.astype(np.int8).reshape(x.shape), scales


def gemv_int8(weight: KernelWeight, x: np.ndarray) -> np.ndarray:
    """As `gemv`, with activations rounded to 8 bits and integer dot products of four bytes."""
    flat, (codes, scales) = Flat(weight), round_activations(x)
    chunks = np.arange(flat.chunks)
    inputs = codes.reshape(len(x), flat.chunks, CHUNK).astype(np.int32)
    input_scales = scales[:, chunks // (INPUT_BLOCK // CHUNK)]
    y = np.zeros((len(x), flat.out_features), np.float32)
    for row in range(flat.out_features):
        words, group = flat.words(row, chunks), flat.group(row, chunks)
        if flat.kind == "4bit":
            halves = words & np.uint32(0x0F0F0F0F), words >> np.uint32(4) & np.uint32(0x0F0F0F0F)
            weights = np.concatenate([half.view(np.int8).reshape(-1, 4) for half in halves], axis=1).astype(np.int32)
            dots = (weights * inputs).sum(axis=2) - 8 * inputs.sum(axis=2)
        else:
            weights = (words ^ np.uint32(0x80808080)).view(np.int8).reshape(-1, CHUNK).astype(np.int32)
            dots = (weights * inputs).sum(axis=2)
        offset = 0 if flat.offsets is None else flat.offsets[group]
        values = flat.scales[group].astype(np.float32) * dots + offset * inputs.sum(axis=2)
        y[:, row] = (input_scales * values).sum(axis=1)
    return y
