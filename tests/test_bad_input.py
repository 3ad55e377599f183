"""A table of bad input: each is one sentence with the next move and code 2, without a traceback or anything half-written."""

import os
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import av
import pytest
import torch
from typer.testing import CliRunner

from vlquant.cli import app
from vlquant.export.vision import export_vision
from vlquant.quantize import quantize
from vlquant.recipe import Recipe

from tests.bad_models import BROKEN, WEIGHTS, row
from tests.golden_folder import golden_folder

ROOT = Path(__file__).parents[1]
GOLDEN = golden_folder()
SMALL = GOLDEN / "internlm2_chat_ntk"
PICTURE = str(GOLDEN / "images" / "square_224.png")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A whole bundle with its vision tower; never changed."""
    folder = quantize(SMALL, recipe=Recipe(method="bnb"), output=tmp_path_factory.mktemp("bundle") / "small")
    export_vision(folder)
    return folder


@pytest.fixture
def place(tmp_path, bundle, monkeypatch):
    """An empty working directory with a copy of the checkpoint and of the bundle, and without a network."""

    def offline(*_):
        raise AssertionError("the network was asked")

    shutil.copytree(SMALL, tmp_path / "model", ignore=shutil.ignore_patterns("golden*"))
    shutil.copytree(bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return tmp_path


def contents(folder: Path) -> dict[str, int]:
    """Every file and folder below, hidden ones too, with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if not path.is_dir()}


def silent_video(path: Path) -> None:
    """A video file that holds a stream and not one frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()


@row("picture is missing", "nothing.png", "give an existing picture file")
def _(place):
    return "chat", "What?", "-m", "bundle", "--image", "nothing.png"


@row("picture is none", "text.png", "cannot be read", "give a whole PNG, JPEG")
def _(place):
    (place / "text.png").write_text("no picture")
    return "chat", "What?", "-m", "bundle", "--image", PICTURE, "--image", "text.png"


@row("picture is a folder", "picture model is a folder", "give a picture file")
def _(place):
    return "chat", "What?", "-m", "bundle", "--image", "model"


@row("picture is enormous", "large.png is too large", "make it smaller")
def _(place):
    shutil.copy(PICTURE, place / "large.png")
    content = bytearray((place / "large.png").read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # Width and height stand first in a PNG.
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (place / "large.png").write_bytes(content)
    return "chat", "What?", "-m", "bundle", "--image", "large.png"


@row("tiles are less than one", "max_tiles is 0", "give one of these")
def _(place):
    return "chat", "What?", "-m", "bundle", "--max-tiles", "0"


@row("temperature is too low to divide by", "temperature is 1e-40", "1e-06 and more")
def _(place):
    return "chat", "What?", "-m", "bundle", "--temperature", "1e-40"


@row("picture is cut short", "half.png", "cannot be read", "give a whole PNG, JPEG")
def _(place):
    shutil.copy(PICTURE, place / "half.png")
    os.truncate(place / "half.png", 300)
    return "chat", "What?", "-m", "bundle", "--image", "half.png"


@row("video has no frames", "empty.mp4", "convert it to MP4")
def _(place):
    silent_video(place / "empty.mp4")
    return "chat", "What?", "-m", "bundle", "--video", "empty.mp4"


@row("video is missing", "nothing.mp4", "check the path")
def _(place):
    return "chat", "What?", "-m", "bundle", "--video", "nothing.mp4"


@row("prompt is longer than the context", "tokens", "192", "--max-tiles")
def _(place):
    return "chat", "What? " * 400, "-m", "bundle", "--image", PICTURE


@row("bundle has no vision tower", "bundle has no vision tower", "vlquant export-vision bundle")
def _(place):
    shutil.rmtree(place / "bundle" / "vision")
    return "chat", "What?", "-m", "bundle", "--image", PICTURE, "--vision", "onnx"


@row("vision tower of a bundle is cut short", "model.data", "wrong size", "vlquant export-vision")
def _(place):
    os.truncate(place / "bundle" / "vision" / "model.data", 1000)
    return "chat", "What?", "-m", "bundle", "--image", PICTURE


@row("bundle is incomplete", "bundle is incomplete", WEIGHTS, "quantize the model again")
def _(place):
    os.truncate(place / "bundle" / WEIGHTS, 1000)
    return "chat", "What?", "-m", "bundle", "--image", PICTURE


@row("CUDA is asked for and absent", "'cuda'", "0 CUDA devices", "use cpu")
def _(place):
    return "chat", "What?", "-m", "bundle", "--device", "cuda"


@row("reference is another checkpoint", str(GOLDEN), "is not the checkpoint", "--reference")
def _(place):
    return "check", "bundle", "--reference", GOLDEN / "qwen2_hermes2", "--limit", "1"


@row("reference is not found", "internlm2_chat_ntk", "is not here", "--reference")
def _(place):
    return "check", "bundle", "--limit", "1"


@row("margin is negative", "-1", "--max-drop 0 to 100")
def _(place):
    return "check", "bundle", "--max-drop", "-1"


@row("what is checked is no bundle", "model is not a bundle", "vlquant quantize")
def _(place):
    return "check", "model", "--limit", "1"


@row("damaged bundle is verified", WEIGHTS, "not as it was written", "quantize the model again")
def _(place):
    flip_last_byte(place / "bundle" / WEIGHTS)
    return "inspect", "bundle", "--verify"


@row("damaged vision tower is verified", "vision/model.data", "not as it was written", "vlquant export-vision")
def _(place):
    flip_last_byte(place / "bundle" / "vision" / "model.data")
    return "inspect", "bundle", "--verify"


@row("there is no bundle to inspect", "no bundle here", "vlquant quantize")
def _(place):
    shutil.rmtree(place / "bundle")
    return ("inspect",)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_sentence(name, place):
    function, words = BROKEN[name]
    arguments = [str(each) for each in function(place)]
    before = contents(place)
    done = CliRunner().invoke(app, arguments, prog_name="vlquant")
    assert done.exit_code == 2, (done.exception, done.stderr)
    *remarks, error = done.stderr.splitlines()
    assert error.startswith("error: ") and not any(line.startswith("error") for line in remarks)
    assert [word for word in words if word not in error] == [], error
    assert "Traceback" not in done.stderr + done.stdout
    assert contents(place) == before


def test_no_space_left_is_one_sentence(place):
    commands = [["quantize", "--method", "bnb", "model"], ["export-vision", "model"]]
    code = (
        "import resource, sys\nfrom vlquant.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        f"for arguments in {commands}:\n"
        "    sys.argv = ['vlquant', *arguments]\n"
        "    try:\n        main()\n    except SystemExit as left:\n        print(left.code)"
    )
    before = contents(place)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["2", "2"], done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ["no space left" in error and "-o" in error for error in errors] == [True, True]
    assert "Traceback" not in done.stderr
    assert contents(place) == before
