"""`vlquant check` on a small checkpoint: what it finds, writes and refuses; arithmetic on made-up answers."""

import io
import json
import shutil

import pytest
from rich.console import Console

from vlquant.bundle import read_manifest
from vlquant.calib_data.samples import samples
from vlquant.check import check, find_reference, summarize
from vlquant.errors import BrokenCheckpoint, InvalidRequest
from vlquant.inspect import check_line, inspect
from vlquant.judge import Judged, judge
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime.pipeline import load
from vlquant.verdict import FAIL, INCONCLUSIVE, PASS

from tests.golden_folder import golden_folder

GOLDEN = golden_folder()
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


def test_inspect_tells_what_a_check_found(bundle, checkpoint):
    result = check(bundle, reference=checkpoint, scenes=2)
    with Console(record=True, width=100, file=io.StringIO()) as console:
        inspect(bundle, console=console)
    lines = [line for line in console.export_text().splitlines() if line.startswith("checked: ")]
    assert any(f"{result.verdict}, {100 * result.difference.mean:+.2f} [" in line for line in lines)
    assert any(f"{result.questions} questions about 2 scenes" in line for line in lines)
    with pytest.raises(BrokenCheckpoint, match="run vlquant check again"):
        check_line(bundle / "config.json")


def test_another_checkpoint_is_not_the_reference(bundle, checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(InvalidRequest, match="config.json differs"):
        check(bundle, reference=other, scenes=1)


def test_the_reference_is_found_beside_the_bundle_and_never_fetched(bundle, checkpoint, monkeypatch, tmp_path):
    import huggingface_hub

    def download(_, *, local_files_only=False, **__):
        assert local_files_only
        raise FileNotFoundError("not downloaded before")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    manifest = read_manifest(bundle)
    assert find_reference(manifest, None, beside=checkpoint.parent / "bundle") == checkpoint
    for name in (checkpoint.name, "InternVL2_5-8B"):
        elsewhere = manifest.model_copy(update={"source": manifest.source.model_copy(update={"name": name})})
        with pytest.raises(InvalidRequest, match=f"{name}, .* is not here; name its folder with --reference"):
            find_reference(elsewhere, None, beside=tmp_path / "bundle")


def test_a_result_that_cannot_be_stored_is_not_lost(bundle, checkpoint, tmp_path):
    folder, remarks = tmp_path / "bundle", []
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("checks"))
    (folder / "checks").write_text("in the way")
    result = check(folder, reference=checkpoint, scenes=1, report=remarks.append)
    assert result.questions > 0
    assert any("this result is not stored" in str(remark.message) for remark in remarks)


@pytest.mark.parametrize("points", [-1, 101, float("nan")])
def test_margins_that_mean_nothing_are_refused(bundle, checkpoint, points):
    with pytest.raises(InvalidRequest, match="--max-drop 0 to 100"):
        check(bundle, reference=checkpoint, scenes=1, max_drop=points)


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
