"""A model's decoder, layers and head, ready to run: by the compiled kernels where they can, otherwise in torch."""

import torch
from torch import Tensor

from vlquant.decoder import LINEARS, Decoder, DecoderLayer, Linear, norm_names
from vlquant.family import LANGUAGE_MODEL
from vlquant.layout import EMBEDDING, HEAD, layer_prefix
from vlquant.mixture import Mixture
from vlquant.model import Model
from vlquant.runtime.linear import Workspace, make_linear
from vlquant.runtime.native import Kernels, NativeLinear, PackedMatrix, native_kernels, pack_linear, round_rows
from vlquant.runtime.native_decoder import HEAD_DIM_MULTIPLE, NativeDecoder, NativeLayer
from vlquant.runtime.packed_weights import head_bits, own_tensors, packed_matrices


def load_decoder(model: Model, device: str | torch.device = "cpu") -> Decoder | NativeDecoder:
    """The decoder of a bundle (packed linears; compiled where the kernels can) or of an unquantized checkpoint (float linears)."""
    kernels = native_kernels() if torch.device(device).type == "cpu" and is_packed(model) else None
    matrices = packed_matrices(model) if kernels and model.config.decoder.head_dim % HEAD_DIM_MULTIPLE == 0 else None
    return layered_decoder(model, device) if matrices is None else native_decoder(model, kernels, matrices)


def layered_decoder(model: Model | Mixture, device: str | torch.device = "cpu") -> Decoder:
    """The decoder with torch between its linears.

    Its embedding keeps the stored precision: widen what `embed` returns to float32.
    """
    config, workspace = model.config.decoder, Workspace(device)
    layers = [load_layer(model, index, workspace) for index in range(config.layers)]
    embedding = model.tensor(EMBEDDING).to(device)
    norm = model.tensor(LANGUAGE_MODEL + "norm.weight").float().to(device)
    head = load_head(model, workspace, embedding if config.tied_head else None)  # A tied one is read and held once.
    return Decoder(config, embedding=embedding, layers=layers, norm=norm, head=head)


def native_decoder(model: Model, kernels: Kernels, matrices: dict[str, PackedMatrix]) -> NativeDecoder:
    """The compiled decoder of a bundle; embeddings are read from the file, row by row."""
    config, norms = model.config.decoder, norm_names(model.config.decoder)
    layers = [
        NativeLayer(
            {name: matrices[f"{index}.{name}"] for name in LINEARS},
            {name: model.tensor(f"{layer_prefix(index)}{name}.weight").float() for name in norms},
        )
        for index in range(config.layers)
    ]
    head = NativeLinear(kernels, matrices["head"]) if "head" in matrices else load_head(model, Workspace())
    norm = model.tensor(LANGUAGE_MODEL + "norm.weight").float()
    return NativeDecoder(config, kernels, embedding=model.embedding_rows, layers=layers, norm=norm, head=head)


def load_layer(model: Model, index: int, workspace: Workspace) -> DecoderLayer:
    """One layer of a bundle or checkpoint."""
    tensors = model.decoder_layer(index)
    linears = {name: load_linear(own_tensors(tensors, name), model.gptq_version, workspace) for name in LINEARS}
    norms = {name: tensors[f"{name}.weight"].float().to(workspace.device) for name in norm_names(model.config.decoder)}
    return DecoderLayer(model.config.decoder, linears, norms)


def load_linear(tensors: dict[str, Tensor], gptq_version: int, workspace: Workspace) -> Linear:
    """One linear, by the kernels where they can."""
    kernels = native_kernels() if torch.device(workspace.device).type == "cpu" else None
    matrix = pack_linear(tensors, gptq_version) if kernels else None
    return make_linear(tensors, workspace=workspace, gptq_version=gptq_version) if matrix is None else NativeLinear(kernels, matrix)


def load_head(model: Model | Mixture, workspace: Workspace, weight: Tensor | None = None) -> Linear:
    """The head: of a quantized model on a CPU with kernels in as many bits as its recipe says, otherwise as stored.

    weight: [vocab, hidden_size], if it was read already.
    """
    weight = model.tensor(HEAD) if weight is None else weight
    kernels = native_kernels() if torch.device(workspace.device).type == "cpu" and is_packed(model) else None
    matrix = round_rows(weight) if kernels and head_bits(model) == 8 else None
    return make_linear({"weight": weight}, workspace=workspace) if matrix is None else NativeLinear(kernels, matrix)


def is_packed(model: Model) -> bool:
    """Whether the kernels may know the language model's form: GPTQ's or bitsandbytes' int8."""
    return any(name.endswith((".qweight", ".SCB")) for name in model.checkpoint)
