"""`vlquant check` on a small checkpoint: what it finds, writes and refuses; arithmetic on made-up answers."""

import json
import shutil
from pathlib import Path

import pytest

from vlquant.calib_data.samples import samples
from vlquant.check import check, summarize
from vlquant.errors import InvalidRequest
from vlquant.judge import Judged, judge
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime.pipeline import load
from vlquant.verdict import FAIL, INCONCLUSIVE, PASS

GOLDEN = Path(__file__).parent / "golden"
ABOUT = {"bundle": "b", "reference": "r", "vision": "onnx", "set": {}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-InternVL"
    shutil.copytree(GOLDEN / "qwen2_internvl2_5_vit6b", folder, ignore=shutil.ignore_patterns("golden.*"))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    recipe = Recipe(bits=4, group_size=32, samples=4)
    return quantize(checkpoint, recipe=recipe, output=tmp_path_factory.mktemp("bundles") / "tiny")


def judged(picture: str, before: float, after: float, kind: str = "text") -> Judged:
    answers = ("x" if before else "y"), ("x" if after else "z")
    return Judged(picture, kind, "?", "x", *answers, before, after, divergence=0.5, same_top=1, tokens=2)


def test_a_model_beside_itself_loses_nothing(checkpoint):
    pipeline = load(checkpoint, vision="torch")
    rows = judge(pipeline, {"itself": pipeline}, samples("check", 11))["itself"]
    assert len(rows) > 20
    assert all(row.reference == row.quantized and row.same_top == row.tokens for row in rows)
    assert max(row.divergence for row in rows) < 1e-6


def test_check_writes_what_it_found(bundle, checkpoint):
    result = check(bundle, reference=checkpoint, scenes=6)
    assert result.vision == "torch (vision not checked)"
    assert result.verdict == INCONCLUSIVE and result.exit_code == 4 and result.pictures_needed > 6
    assert result.divergence > 1e-4 and 0 < result.top_agreement <= 1
    (path,) = (bundle / "checks").iterdir()
    first = path.read_bytes()
    assert json.loads(first)["questions"] == result.questions
    check(bundle, reference=checkpoint, scenes=6)
    assert [each.read_bytes() for each in (bundle / "checks").iterdir()] == [first]


def test_another_checkpoint_is_not_the_reference(bundle, checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(InvalidRequest, match="config.json differs"):
        check(bundle, reference=other, scenes=1)


def test_no_scenes_are_too_few(bundle, checkpoint):
    with pytest.raises(InvalidRequest, match="too few"):
        check(bundle, reference=checkpoint, scenes=0)


def test_scores_are_means_over_pictures():
    rows = [judged("a", 1, 1), judged("a", 1, 0), judged("b", 1, 1), judged("c", 0, 1, kind="chart")]
    result = summarize(rows, margin=1.5, about=ABOUT)
    assert (result.pictures, result.questions) == (3, 4)
    assert result.reference_score == pytest.approx(2 / 3)
    assert result.quantized_score == pytest.approx((0.5 + 1 + 1) / 3)
    assert result.difference.mean == pytest.approx((-0.5 + 0 + 1) / 3)
    kinds = {each.kind: each for each in result.kinds}
    assert (kinds["text"].lost, kinds["text"].won, kinds["text"].changed) == (1, 0, 1)
    assert (kinds["chart"].lost, kinds["chart"].won) == (0, 1)
    assert result.divergence == pytest.approx(0.5) and result.top_agreement == pytest.approx(0.5)


@pytest.mark.parametrize(("lost", "verdict"), [(0, PASS), (8, INCONCLUSIVE), (100, FAIL)])
def test_verdicts(lost, verdict):
    rows = [judged(str(index), 1, 0 if index < lost else 1) for index in range(600)]
    result = summarize(rows, margin=1.5, about=ABOUT)
    assert result.verdict == verdict
    assert (result.pictures_needed is not None) == (verdict == INCONCLUSIVE)
