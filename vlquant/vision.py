"""InternViT, pixel shuffle and projector in plain torch: pixels to visual tokens.

Pure functions over a mapping of tensors; knows no files. Weight names are those of the `-hf`
layout without the leading "model.".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlquant.decoder import rms_norm

Weights = Mapping[str, Tensor]
Stage = Callable[[Tensor, Weights], Tensor]

PROJECTOR_NORM_EPS = 1e-5  # nn.LayerNorm's default, which the original projector uses.


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision tower; every value comes from the checkpoint's config.json."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    patch_size: int
    """Pixels."""
    image_size: int
    """Tile side in pixels."""
    norm: str
    """"layer_norm" (InternViT-300M) or "rms_norm" (InternViT-6B)."""
    norm_eps: float
    query_key_value_bias: bool
    query_key_norm: bool
    """RMSNorm over the whole query and key vectors, all heads together (InternViT-6B)."""
    select_layer: int = -1
    pixel_shuffle: str = "v2"
    """"v1" yields the transposed token order."""
    downsample_ratio: float = 0.5

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return int(self.patches_per_side**2 * self.downsample_ratio**2)

    @property
    def layers_to_run(self) -> int:
        """Encoder layers up to the selected hidden state; state 0 is the embedding."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


def vision_features(pixel_values: Tensor, weights: Weights, config: VisionConfig) -> Tensor:
    """Visual tokens [tiles, tokens_per_tile, language hidden] of `pixel_values` [tiles, 3, side, side]."""
    hidden = pixel_values
    for stage in vision_stages(config):
        hidden = stage(hidden, weights)
    return hidden


def vision_stages(config: VisionConfig) -> list[Stage]:
    """The network in stages, each from the one before: the embedding, every layer, and all that follows them.

    Each asks for its own weights only, so that a tower larger than the memory can be run.
    """
    layers = [partial(encoder_layer, config=config, prefix=f"vision_tower.encoder.layer.{index}.") for index in range(config.layers_to_run)]
    return [partial(embed_patches, config=config), *layers, partial(visual_tokens, config=config)]


def visual_tokens(hidden: Tensor, weights: Weights, config: VisionConfig) -> Tensor:
    """The last hidden state without its class token, as tokens of the language model."""
    return project(shuffle_pixels(hidden[:, 1:], config), weights)


def embed_patches(pixel_values: Tensor, weights: Weights, config: VisionConfig) -> Tensor:
    """Class token and patch embeddings with positions, [tiles, 1 + patches, hidden_size]."""
    prefix = "vision_tower.embeddings."
    kernel = weights[prefix + "patch_embeddings.projection.weight"]  # [hidden, 3, patch, patch]
    size = config.patch_size
    patches = pixel_values.unfold(2, size, size).unfold(3, size, size)  # [tiles, 3, rows, columns, patch, patch]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [tiles, patches, 3 * patch * patch]
    # A convolution whose stride is its kernel is a matmul over patches.
    embedded = F.linear(patches, kernel.flatten(1), weights[prefix + "patch_embeddings.projection.bias"])
    class_token = weights[prefix + "cls_token"].expand(len(pixel_values), -1, -1)
    return torch.cat((class_token, embedded), dim=1) + weights[prefix + "position_embeddings"]


def encoder_layer(hidden: Tensor, weights: Weights, config: VisionConfig, *, prefix: str) -> Tensor:
    """One InternViT layer over [tiles, tokens, hidden_size]; each branch is scaled by its lambda."""
    normed = normalise(hidden, weights, config, prefix=prefix + "layernorm_before")
    hidden = hidden + attention(normed, weights, config, prefix=prefix + "attention.") * weights[prefix + "lambda_1"]
    normed = normalise(hidden, weights, config, prefix=prefix + "layernorm_after")
    inner = F.gelu(linear(normed, weights, prefix + "mlp.fc1"))
    return hidden + linear(inner, weights, prefix + "mlp.fc2") * weights[prefix + "lambda_2"]


def attention(x: Tensor, weights: Weights, config: VisionConfig, *, prefix: str) -> Tensor:
    """Full self-attention over the tokens of each tile, [tiles, tokens, hidden_size]."""
    queries, keys, values = (linear(x, weights, prefix + name) for name in ("q_proj", "k_proj", "v_proj"))
    if config.query_key_norm:
        queries = rms_norm(queries, weights[prefix + "q_norm.weight"], config.norm_eps)
        keys = rms_norm(keys, weights[prefix + "k_norm.weight"], config.norm_eps)
    heads = [each.unflatten(-1, (config.heads, -1)).transpose(1, 2) for each in (queries, keys, values)]
    mixed = F.scaled_dot_product_attention(*heads)  # [tiles, heads, tokens, head_dim]
    return linear(mixed.transpose(1, 2).flatten(2), weights, prefix + "projection_layer")


def shuffle_pixels(patches: Tensor, config: VisionConfig) -> Tensor:
    """Fold each block of neighbouring patches into one token of proportionally more channels.

    patches: [tiles, patches, hidden_size] -> [tiles, tokens_per_tile, hidden_size / downsample_ratio ** 2].
    Source: pixel_shuffle of the original InternVLChatModel, both versions.
    """
    tiles, _, channels = patches.shape
    side, ratio = config.patches_per_side, config.downsample_ratio
    small, wide = int(side * ratio), int(channels / ratio)
    x = patches.reshape(tiles, side, small, wide).permute(0, 2, 1, 3)  # [tiles, small, side, wide]
    x = x.reshape(tiles, small, small, int(wide / ratio))
    if config.pixel_shuffle != "v1":
        x = x.permute(0, 2, 1, 3)
    return x.flatten(1, 2)


def project(tokens: Tensor, weights: Weights) -> Tensor:
    """The MLP between tower and language model: norm, linear, GELU, linear."""
    prefix = "multi_modal_projector."
    weight, bias = weights[prefix + "layer_norm.weight"], weights[prefix + "layer_norm.bias"]
    normed = F.layer_norm(tokens, tokens.shape[-1:], weight, bias, PROJECTOR_NORM_EPS)
    return linear(F.gelu(linear(normed, weights, prefix + "linear_1")), weights, prefix + "linear_2")


def normalise(x: Tensor, weights: Weights, config: VisionConfig, *, prefix: str) -> Tensor:
    """LayerNorm or RMSNorm, as the tower was built."""
    if config.norm == "rms_norm":
        return rms_norm(x, weights[prefix + ".weight"], config.norm_eps)
    return F.layer_norm(x, x.shape[-1:], weights[prefix + ".weight"], weights[prefix + ".bias"], config.norm_eps)


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))
