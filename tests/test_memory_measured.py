"""What `vlquant plan` says of InternVL2_5-1B on a CPU against what its chat takes; gigabytes and minutes: runs with `-m slow`.

tests/RESULTS.md keeps what was measured. Peak memory is VmHWM of a process that loads the bundle, answers and ends.
"""

import subprocess
import sys

import pytest

from vlquant.export.vision import export_vision
from vlquant.plan import plan
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.synthesize import synthesize

NAME = "InternVL2_5-1B"
ASK = """
import random, sys
from PIL import Image
from vlquant.machine import peak_memory
from vlquant.request import Request
from vlquant.runtime import Generation, load

bundle, columns, rows, context = sys.argv[1], *map(int, sys.argv[2:])
pipe, answer = load(bundle), Generation(max_new_tokens=8)
side = pipe.config.chat.image_size
pixels = random.Random(0).randbytes(3 * columns * rows * side * side)
pictures = [Image.frombytes("RGB", (columns * side, rows * side), pixels)] if columns else []
fixed, words = (len(pipe.encode(Request(text, images=pictures)).ids) for text in ("x", "x" + " word" * 100))
count = max(0, (context - answer.max_new_tokens - fixed) * 100 // (words - fixed))
said = pipe.ask("x" + " word" * count, pictures, generation=answer)
print(sum(said.tiles))
print(said.usage.prompt_tokens + said.usage.answer_tokens)
print(peak_memory())
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    made = quantize(synthesize(NAME, folder / NAME), recipe=Recipe("rtn", 4), output=folder / "bundle")
    export_vision(made)
    ask(made, 0, 0, 640)  # The first load packs the weights; every later one maps them.
    return made


def ask(bundle, *size):
    """Tiles, tokens and peak memory of a process that answers."""
    command = [sys.executable, "-c", ASK, str(bundle), *map(str, size)]
    return map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "rows", "context"), [(0, 0, 640), (1, 1, 1024), (0, 0, 4096), (4, 3, 4096)])
def test_a_chat_takes_what_was_planned(bundle, columns, rows, context):
    tiles, tokens, peak = ask(bundle, columns, rows, context)
    planned = plan(bundle, device="cpu", memory=10**12, context=tokens, tiles=tiles).choices[0]
    print(f"{tiles} tiles, {tokens} tokens: {peak / 1e9:.2f} GB measured, {planned.total / 1e9:.2f} planned")
    assert planned.vision == "fp32" and planned.total == pytest.approx(peak, rel=0.1)
