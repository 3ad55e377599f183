"""Too little memory of a GPU shows before the first hour; without a GPU the same code is run on the CPU."""

import pytest
import torch

from vlquant import rehearsal
from vlquant.errors import InvalidRequest
from vlquant.recipe import Recipe


@pytest.mark.parametrize("recipe", [Recipe(group_size=32, tokens=64), Recipe(bits=8, group_size=-1, tokens=64, compensation=0.0)])
@pytest.mark.parametrize("name", ["internlm2_internvl2_5", "qwen2_internvl2_5_vit6b", "phi3_chat"])
def test_a_layer_of_every_family_is_rehearsed(named_case, name, recipe):
    rehearsal.rehearse(named_case(name).config, recipe, device="cpu")


def test_running_out_of_memory_is_a_sentence(named_case, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vlquant.gptq.solve", full)
    with pytest.raises(InvalidRequest, match="too little free memory .* --device cpu"):
        rehearsal.rehearse(named_case("internlm2_internvl2_5").config, Recipe(group_size=32, tokens=64), device="cpu")


def test_a_limit_of_memory_needs_a_gpu_that_has_it(monkeypatch):
    with pytest.raises(InvalidRequest, match="add --device cuda"):
        rehearsal.limit_memory("cpu", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    limits = []
    card = type("Card", (), {"total_memory": 11_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr("vlquant.runtime.reader.require_code_for", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append((share, device)))
    with pytest.raises(InvalidRequest, match="no part of the 11.0 GB"):
        rehearsal.limit_memory("cuda", 12)
    rehearsal.limit_memory("cuda", 5.5)
    rehearsal.limit_memory("cuda:1", 11)
    assert limits == [(0.5, 0), (1.0, 1)]
    with pytest.raises(InvalidRequest, match="device 'foo' is unknown"):
        rehearsal.limit_memory("foo", 5)


def test_the_gpu_is_rehearsed_before_anything_is_written(named_case, tmp_path, monkeypatch):
    """As on a machine with a GPU that is too small."""
    from vlquant import quantize as verb

    def too_small(config, recipe, *, device):
        raise InvalidRequest(f"{device} has too little free memory")

    monkeypatch.setattr(verb, "require_device", lambda name: torch.device(name))
    monkeypatch.setattr(verb, "rehearse", too_small)
    with pytest.raises(InvalidRequest, match="cuda has too little"):
        verb.quantize(named_case("internlm2_internvl2_5").folder, recipe=Recipe(group_size=32, samples=1), output=tmp_path / "out", device="cuda")
    assert list(tmp_path.iterdir()) == []
