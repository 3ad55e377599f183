"""The one decoder equals transformers' classes, with and without cache, padding and dynamic rope."""

import pytest
import torch

from vlquant.decoder import Decoder, FloatLinear, KeyValueCache, attend, float_layer, visible_keys
from vlquant.decoder_config import DecoderConfig, LongRope, Rope

transformers = pytest.importorskip("transformers", reason="compared with transformers' own classes")

SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 70,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

LONG = LongRope(short_factors=(1.0, 1.1, 1.3, 1.6), long_factors=(1.2, 2.5, 4.0, 8.0), short_reach=12)


def spelled(rope: dict) -> dict:
    """A rope in the words of the transformers at hand: version 5 has one entry where 4 has two."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": rope}
    # Phi3Config of version 4 wants the older key for the kind and no other entries than the two lists.
    kind = "type" if rope["rope_type"] == "longrope" else "rope_type"
    kept = {key: value for key, value in rope.items() if key in ("factor", "short_factor", "long_factor")}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": {kind: rope["rope_type"], **kept} if kept else None}


def build_theirs(kind: str):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    if kind == "qwen2":
        config = transformers.Qwen2Config(**SHAPE, **spelled(rope))
        return transformers.Qwen2ForCausalLM(config).eval()
    if kind == "qwen3":
        return with_uneven_norms(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=16, **spelled(rope))))
    if kind == "phi3":
        rope |= {"rope_type": "longrope", "short_factor": list(LONG.short_factors), "long_factor": list(LONG.long_factors)}
        rope |= {"original_max_position_embeddings": LONG.short_reach}
        extra = {"original_max_position_embeddings": LONG.short_reach, "pad_token_id": 0}
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHAPE, **extra, **spelled(rope))).eval()
    config = transformers.LlamaConfig(**SHAPE, **spelled(rope), attention_bias=kind == "biased")
    return transformers.LlamaForCausalLM(config).eval()


def with_uneven_norms(model):
    """All scales of one would hide which norm is applied where."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


def unfused(weights):
    """Phi-3's stacked tensors apart."""
    apart = {}
    for name, weight in weights.items():
        if "qkv_proj" in name:
            for part, rows in zip(("q", "k", "v"), weight.split([48, 16, 16]), strict=True):
                apart[name.replace("qkv", part)] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), weight.chunk(2), strict=True):
                apart[name.replace("gate_up", part)] = rows
        else:
            apart[name] = weight
    return apart


def build_ours(theirs, kind: str) -> Decoder:
    config = DecoderConfig(
        hidden_size=48,
        layers=2,
        heads=6,
        key_value_heads=2,
        head_dim=16 if kind == "qwen3" else 8,
        intermediate_size=80,
        vocab_size=70,
        norm_eps=1e-5,
        rope=Rope(10000.0, 2.0 if kind == "dynamic" else None, LONG if kind == "phi3" else None),
        max_positions=24,
        query_key_norm=kind == "qwen3",
    )
    weights = unfused({name: tensor.detach() for name, tensor in theirs.state_dict().items()})
    layers = []
    for index in range(2):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        layers.append(float_layer(own, config))
    embedding, norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
    return Decoder(config, embedding=embedding, layers=layers, norm=norm, head=FloatLinear(weights["lm_head.weight"]))


@pytest.mark.parametrize(
    ("kind", "length"),
    [("llama", 20), ("biased", 20), ("qwen2", 20), ("qwen3", 20), ("dynamic", 40), ("phi3", 11), ("phi3", 13), ("phi3", 20)],
)
@torch.inference_mode()
def test_equals_transformers(kind, length):
    theirs = build_theirs(kind)
    ours = build_ours(theirs, kind)
    ids = torch.randint(0, 70, (2, length))
    expected = theirs(ids).logits
    assert torch.allclose(ours(ours.embed(ids), all_positions=True), expected, atol=1e-4)
    assert torch.allclose(ours(ours.embed(ids))[:, 0], expected[:, -1], atol=1e-4)


@torch.inference_mode()
def test_left_padding_changes_nothing():
    ours = build_ours(build_theirs("llama"), "llama")
    ids = torch.randint(0, 70, (1, 9))
    alone = ours(ours.embed(ids), all_positions=True)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), dim=1)
    mask = torch.tensor([[False] * 5 + [True] * 9])
    beside = ours(ours.embed(padded), attention_mask=mask, all_positions=True)
    assert torch.isfinite(beside).all()
    assert torch.allclose(beside[:, 5:], alone, atol=1e-5)


@pytest.mark.parametrize("pieces", [[7, 1, 1, 1], [4, 3, 3], [1] * 10])
@torch.inference_mode()
def test_cached_equals_uncached(pieces):
    ours = build_ours(build_theirs("qwen2"), "qwen2")
    ids = torch.randint(0, 70, (3, 10))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, :3] = False
    whole = ours(ours.embed(ids), attention_mask=mask, all_positions=True)
    cache = KeyValueCache(ours.config, batch=3, capacity=12)
    for size in pieces:
        start = cache.length
        part = ours.embed(ids[:, start : start + size])
        logits = ours(part, attention_mask=mask[:, : start + size], cache=cache, all_positions=True)
        real = mask[:, start : start + size]
        assert torch.allclose(logits[real], whole[:, start : start + size][real], atol=1e-5)


def test_attention_without_repeating_keys_equals_repeating_them():
    torch.manual_seed(1)
    queries, keys, values = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    repeated = [each.repeat_interleave(3, dim=1) for each in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(queries, *repeated, is_causal=True)
    causal = visible_keys(torch.ones(2, 5, dtype=torch.bool), 5)
    assert torch.allclose(attend(queries, keys, values, None), expected, atol=1e-6)
    assert torch.allclose(attend(queries, keys, values, causal), expected, atol=1e-6)


def test_a_padded_position_sees_only_itself():
    visible = visible_keys(torch.tensor([[False, False, True, True]]), 4)
    assert visible[0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
