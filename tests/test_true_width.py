"""Two layers of published models at their true widths, through the commands a user types; `-m slow` runs the larger ones.

tests/RESULTS.md keeps what was measured.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlquant.bundle import read_manifest
from vlquant.members import MEMBERS
from vlquant.model import open_model

PICTURE = Path(__file__).parent / "golden" / "images" / "wide_1280x720.png"
SMALL = ("InternVL2_5-1B",)
LARGE = ("InternVL2-2B", "InternVL3_5-1B", "InternVL2-4B", "InternVL2-40B")


def vlquant(*arguments, folder):
    """Run one command; returns its output and its peak memory in GiB, which is VmHWM."""
    command = [sys.executable, "-m", "vlquant", *map(str, arguments)]
    with open(folder / "stdout", "w+") as out, open(folder / "stderr", "w+") as errors:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0), errors.seek(0)
        assert os.waitstatus_to_exitcode(status) == 0, errors.read()
        peak = usage.ru_maxrss / 2**20
        print(f"{arguments[0]} {peak:.2f} GiB {usage.ru_utime + usage.ru_stime:.0f} s of processor time")
        return out.read().strip(), peak


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_the_whole_way_at_true_width(name, tmp_path):
    depth = ("--layers", 2, "--vision-layers", 2)
    vlquant("synthesize", name, name, *depth, folder=tmp_path)
    bundle, _ = vlquant("quantize", "--method", "rtn", name, folder=tmp_path)
    _, peak = vlquant("export-vision", bundle, folder=tmp_path)
    assert peak < 2.5
    vlquant("chat", "What is it?", "-m", bundle, "--image", PICTURE, "--max-tiles", 2, "--max-new-tokens", 3, folder=tmp_path)
    shown, _ = vlquant("prompt", "What is it?", "-m", bundle, "--image", PICTURE, "--max-tiles", 2, folder=tmp_path)
    assert "<img>{768 x <IMG_CONTEXT>}</img>" in shown  # 2 tiles and the thumbnail of 256 tokens each.
    config, member = open_model(tmp_path / bundle).config, MEMBERS[name]
    assert (config.decoder.hidden_size, config.decoder.layers, config.vision.layers) == (member.hidden_size, 2, 2)
    assert len(read_manifest(tmp_path / bundle).modules) == 14
    shutil.rmtree(tmp_path)  # Gigabytes.
