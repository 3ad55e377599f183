"""Golden folders: outputs of the original implementation on small checkpoints (tests/golden/README.md).

VLQUANT_GOLDEN may name further folders of the same form.
"""

import functools
import json
import os
from pathlib import Path

import pytest
from PIL import Image


from tests.golden_folder import golden_folder

GOLDEN = golden_folder()


def golden_roots() -> list[Path]:
    further = os.environ.get("VLQUANT_GOLDEN", "")
    return [GOLDEN, *(Path(part) for part in further.split(os.pathsep) if part)]


class GoldenCase:
    """One small checkpoint with what the original made of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.header = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
        self.conversations = self.header["conversations"]

    @functools.cached_property
    def model(self):
        from vlquant.model import open_model

        return open_model(self.folder)

    @functools.cached_property
    def config(self):
        return self.model.config

    @functools.cached_property
    def decoder(self):
        from vlquant.model import float_decoder

        return float_decoder(self.model)

    @functools.cached_property
    def vision(self):
        return {name: tensor.float() for name, tensor in self.model.vision_tensors().items()}

    @functools.cached_property
    def tokenizer(self):
        from vlquant.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    @functools.cached_property
    def stored(self):
        """The checkpoint's own tensors, of all its shards."""
        from safetensors.torch import load_file

        return {name: tensor for path in self.folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}

    @functools.cached_property
    def tensors(self):
        from safetensors.torch import load_file

        return load_file(self.folder / "golden.safetensors")

    def image(self, name: str) -> Image.Image:
        return Image.open(self.folder.parent / "images" / name).convert("RGB")

    def recorded_tokens(self, features):
        """Those visual tokens [tiles, tokens, hidden] of which the recordings hold a value."""
        return features[:, :: self.header.get("feature_token_step", 1)]

    def answers(self, conversation) -> list[str]:
        """The texts of one call, one per row."""
        return conversation.get("responses") or [conversation["response"]]


@functools.cache
def golden_cases() -> tuple[GoldenCase, ...]:
    folders = {}
    for root in golden_roots():
        for path in sorted(root.glob("*/golden.json")):
            if (path.parent / "config.json").exists():
                folders[path.parent.name] = path.parent  # A folder named by the user may hold more of the same case.
    return tuple(GoldenCase(folder) for folder in folders.values())


def decided(call: dict) -> bool:
    """Whether a call is about pictures, and the original knew its answer: the smallest margin in tests/golden is 0.0017."""
    return bool(call["images"]) and call["min_margin"] > 1e-4


def pytest_generate_tests(metafunc):
    """`case` runs over all golden checkpoints, `case, conversation` over all calls recorded with them.

    `case, pictured` runs over those about pictures whose answer rounding cannot decide.
    """
    names = set(metafunc.fixturenames)
    kind = next((kind for kind in ("conversation", "pictured") if {"case", kind} <= names), None)
    if kind:
        pairs = [(case, call) for case in golden_cases() for call in case.conversations if kind == "conversation" or decided(call)]
        metafunc.parametrize(("case", kind), pairs, ids=[f"{case.folder.name}-{call['key']}" for case, call in pairs])
    elif "case" in names:
        metafunc.parametrize("case", golden_cases(), ids=lambda case: case.folder.name)
    if "golden_root" in names:
        metafunc.parametrize("golden_root", golden_roots(), ids=str)


@pytest.fixture(autouse=True, scope="session")
def reload_here():
    """Bundles are read back in this process, which spares every test the start of another one."""
    import vlquant.quantize
    from vlquant.reload import reload, reload_elsewhere

    vlquant.quantize.reload_elsewhere = reload
    yield
    vlquant.quantize.reload_elsewhere = reload_elsewhere


@pytest.fixture
def named_case():
    """A golden checkpoint by its folder's name."""
    return {case.folder.name: case for case in golden_cases()}.__getitem__


@pytest.fixture
def small_case(named_case) -> GoldenCase:
    """The smallest InternLM2 checkpoint: for tests that need any real one."""
    return named_case("internlm2_chat_ntk")


@pytest.fixture
def copied(small_case, tmp_path) -> Path:
    """A writable copy of the smallest checkpoint, without its golden data."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in small_case.folder.iterdir():
        if not path.name.startswith("golden"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def torch_kernels(monkeypatch):
    """Linears in float32, expanded: what compiled kernels are measured by."""
    monkeypatch.setenv("VLQUANT_KERNELS", "torch")


@pytest.fixture(params=["avx2", "vnni"])
def kernels(request):
    """The compiled kernels, for each set of instructions that this processor has."""
    from vlquant.runtime.native import CHOICES, Kernels, native_kernels

    found = native_kernels()
    if found is None or CHOICES[request.param] > found.instructions:
        pytest.skip(f"no kernels for {request.param} here")
    return Kernels(found.library._name, CHOICES[request.param])
