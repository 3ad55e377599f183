"""`vlquant check` on a small checkpoint: what it finds, writes, keeps and refuses."""

import csv
import errno
import io
import json
import shutil

import pytest
from rich.console import Console

from vlquant.asking import ROWS, question_batches
from vlquant.bundle import read_manifest
from vlquant.calib_data.check_sets import BuiltinQuestions
from vlquant.calib_data.samples import draw_sample
from vlquant.check import check
from vlquant.check_options import CheckOptions
from vlquant.check_result import read_result, to_json
from vlquant.errors import BrokenCheckpoint, InvalidRequest, OutputRefused
from vlquant.inspect import check_line, inspect
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.reference import find_reference
from vlquant.runtime.pipeline import Pipeline
from vlquant.verdict import FAIL, INCONCLUSIVE, STRUCTURE

from tests import planted
from tests.golden_folder import golden_folder

GOLDEN = golden_folder()
FEW = CheckOptions(limit=12, max_new_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-InternVL"
    shutil.copytree(GOLDEN / "qwen2_internvl2_5_vit6b", folder, ignore=shutil.ignore_patterns("golden.*"))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    recipe = Recipe(bits=4, group_size=32, samples=4)
    return quantize(checkpoint, recipe=recipe, output=tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch):
    """Questions that models answer by themselves, one entry per batch."""
    batches, batch = [], Pipeline.batch

    def count(pipeline, requests, *options, **features):
        batches.append(len(requests))
        return batch(pipeline, requests, *options, **features)

    monkeypatch.setattr(Pipeline, "batch", count)
    return batches


def test_check_writes_what_it_found(bundle, checkpoint):
    result = check(bundle, reference=checkpoint, options=FEW)
    assert result.vision == "torch (vision not checked)" and result.forced_text == "reference"
    assert result.questions >= 12 and result.sets[0].name == "builtin" and len(result.sets[0].sha256) == 64
    assert result.distribution.mean_divergence > 1e-4 and 0 < result.distribution.top_agreement <= 1
    assert sum(each.tokens for each in result.histogram) == result.distribution.tokens
    assert result.blame.vision is None and result.blame.language_model > 0
    assert result.noise_floor.divergence < 1e-6
    assert {each.kind for each in result.kinds} >= {"document", "receipt"}
    assert result.layers[0].error > 0 and set(result.layers[0].class_errors) == {"vision", "prompt", "answer"}
    (place,) = (bundle / "checks").iterdir()
    assert {path.name for path in place.iterdir()} == {"report.json", "report.html", "builtin-reference.tsv", "builtin-bundle.tsv"}
    assert read_result(place / "report.json") == result and "<html" in (place / "report.html").read_text()


def test_the_same_check_gives_the_same_bytes_and_asks_nothing_twice(bundle, checkpoint, asked):
    def files():
        return {path.name: path.read_bytes() for path in (bundle / "checks").glob("*/*")}

    shutil.rmtree(bundle / "checks", ignore_errors=True)
    check(bundle, reference=checkpoint, options=FEW)
    first, batches = files(), len(asked)
    check(bundle, reference=checkpoint, options=FEW)
    assert files() == first
    repeated = asked[batches:]
    assert max(repeated) <= 5  # Only the noise floor is measured anew.


def test_a_float_copy_loses_nothing(bundle, checkpoint, tmp_path):
    result = check(planted.float_bundle(bundle, checkpoint, tmp_path / "float"), reference=checkpoint, options=FEW)
    assert result.distribution.mean_divergence < 1e-6 and result.distribution.top_agreement == 1
    assert result.generated.flips.changed == 0 and result.verdict.difference.mean == 0
    assert result.verdict.outcome == INCONCLUSIVE and result.exit_code == 4 and result.verdict.pictures_needed > 100


def test_another_prompt_is_a_fault_of_structure(bundle, checkpoint, tmp_path):
    folder = planted.copied(bundle, tmp_path / "parrot")
    planted.set_system_message(folder, "You are a parrot.")
    result = check(folder, reference=checkpoint, options=FEW)
    assert (result.verdict.outcome, result.exit_code) == (FAIL, 3)
    assert {each.name for each in result.verdict.grounds} == {STRUCTURE}
    assert "token ids differ" in result.verdict.reason and result.distribution is None


def test_tiles_in_another_order_are_a_fault_of_structure(bundle, checkpoint, tmp_path):
    folder = planted.copied(bundle, tmp_path / "turned")
    with planted.tiles_turned(folder, 1):
        result = check(folder, reference=checkpoint, options=FEW)
    assert any(each.name == STRUCTURE and "tiles show something else" in each.reason for each in result.verdict.grounds)


def test_models_that_do_not_fit_are_compared_along_right_answers(bundle, checkpoint, asked):
    remarks = []
    options = CheckOptions(limit=12, memory=0.0001)
    result = check(bundle, reference=checkpoint, options=options, report=lambda event: remarks.append(event.message))
    assert asked == [] and result.forced_text == "gold" and result.generated is None and result.noise_floor is None
    assert result.distribution.mean_divergence > 1e-4 and result.verdict.outcome == INCONCLUSIVE
    assert "no answers of both models were scored" in result.verdict.reason
    assert sum("would take about" in remark for remark in remarks) == 2
    assert check_line(next((bundle / "checks").glob("*/report.json")))


def test_answers_made_elsewhere(bundle, checkpoint, tmp_path, asked):
    result = check(bundle, reference=checkpoint, options=FEW)
    (place,) = (path.parent for path in (bundle / "checks").glob("*/report.json") if read_result(path) == result)
    shutil.copy(place / "builtin-reference.tsv", tmp_path / "made.tsv")
    asked.clear()
    options = CheckOptions(limit=12, max_new_tokens=6, reference_predictions=str(tmp_path / "made.tsv"))
    imported = check(bundle, reference=checkpoint, options=options)
    assert imported.forced_text == "imported" and asked == [] and imported.noise_floor is None
    assert imported.generated.reference == result.generated.reference
    assert imported.generated.flips == result.generated.flips
    rows = list(csv.DictReader(open(tmp_path / "made.tsv", newline=""), delimiter="\t"))
    assert len(rows) == result.questions and {"index", "question", "answer", "prediction"} <= set(rows[0])
    (tmp_path / "made.tsv").write_text("index\tquestion\tprediction\n")
    with pytest.raises(InvalidRequest, match="no prediction for"):
        check(bundle, reference=checkpoint, options=options)


def test_an_interrupted_check_goes_on(bundle, checkpoint, asked, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vlquant.check.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            check(bundle, reference=checkpoint, options=FEW)
    asked.clear()
    check(bundle, reference=checkpoint, options=FEW)
    assert max(asked) <= 5


def write_set(folder, count=4, answers=True):
    """A VLMEvalKit file about scenes of the development split."""
    import base64

    rows = []
    for index in range(count):
        sample, picture = draw_sample("development", index), io.BytesIO()
        sample.images[0].save(picture, "PNG")
        question = sample.questions[0]
        row = {"index": index, "image": base64.b64encode(picture.getvalue()).decode(), "question": question.text, "category": f"c{index % 2}"}
        rows.append(row | ({"answer": question.answer} if answers else {}))
    path = folder / "Mine_DocVQA.tsv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_several_sets(bundle, checkpoint, tmp_path):
    options = CheckOptions(sets=("builtin", str(write_set(tmp_path))), limit=4, max_new_tokens=6)
    result = check(bundle, reference=checkpoint, options=options)
    assert [(each.name, each.metrics) for each in result.sets][1] == ("Mine_DocVQA", ("anls",))
    assert {"c0", "c1"} <= {each.kind for each in result.kinds}


def test_questions_without_answers_tell_how_far_distributions_are_apart(bundle, checkpoint, tmp_path):
    options = CheckOptions(sets=(str(write_set(tmp_path, answers=False)),), max_new_tokens=6)
    result = check(bundle, reference=checkpoint, options=options)
    assert result.generated is None and result.distribution.tokens > 0 and result.forced_text == "reference"
    assert all(each.verdict is None and each.flips is not None for each in result.kinds)
    without = check(bundle, reference=checkpoint, options=CheckOptions(sets=options.sets, max_new_tokens=6, memory=0.0001))
    assert without.distribution is None and without.verdict.outcome == INCONCLUSIVE


def test_inspect_tells_what_a_check_found(bundle, checkpoint):
    result = check(bundle, reference=checkpoint, options=FEW)
    with Console(record=True, width=100, file=io.StringIO()) as console:
        inspect(bundle, console=console)
    lines = [line for line in console.export_text().splitlines() if line.startswith("checked: ")]
    difference = result.verdict.difference
    assert any(f"{result.verdict.outcome}, {100 * difference.mean:+.2f} [" in line and "pictures of builtin" in line for line in lines)
    with pytest.raises(BrokenCheckpoint, match="run vlquant check again"):
        check_line(bundle / "config.json")


def test_a_part_of_a_bundle_is_not_inspected(bundle):
    (bundle / "vision").mkdir(exist_ok=True)
    with pytest.raises(InvalidRequest, match="part of a bundle; inspect the whole: vlquant inspect"):
        inspect(bundle / "vision")
    (bundle / "vision").rmdir()


def test_a_result_can_be_read_again(bundle, checkpoint):
    text = to_json(check(bundle, reference=checkpoint, options=FEW))
    assert json.loads(text)["format_version"] == 3 and not any(word in text for word in ("NaN", "Infinity", str(bundle)))


def test_another_checkpoint_is_not_the_reference(bundle, checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(InvalidRequest, match="config.json differs"):
        check(bundle, reference=other, options=FEW)


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
    folder, remarks = planted.copied(bundle, tmp_path / "bundle"), []
    (folder / "checks").write_text("in the way")
    result = check(folder, reference=checkpoint, options=FEW, report=remarks.append)
    assert result.questions > 0
    assert any("this result is not stored" in str(remark.message) for remark in remarks)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_drop": -1}, "--max-drop 0 to 100"),
        ({"max_drop": 101}, "--max-drop 0 to 100"),
        ({"max_drop": float("nan")}, "--max-drop 0 to 100"),
        ({"memory": -1}, "--memory 0 or more"),
        ({"sets": ()}, "--set builtin"),
        ({"sets": ("builtin", "a.tsv"), "reference_predictions": "x.tsv"}, "one by one"),
    ],
)
def test_options_that_mean_nothing_are_refused(fields, said):
    with pytest.raises(InvalidRequest, match=said):
        CheckOptions(**fields)


def test_sets_of_one_name_are_refused(bundle, checkpoint):
    with pytest.raises(InvalidRequest, match="two sets are called builtin"):
        check(bundle, reference=checkpoint, options=CheckOptions(sets=("builtin", "builtin"), limit=1))


def test_names_that_make_one_file_are_refused(bundle, checkpoint, tmp_path):
    first = write_set(tmp_path)
    second = first.rename(tmp_path / "mine docvqa.tsv"), write_set(tmp_path).rename(tmp_path / "Mine_DocVQA.tsv")
    with pytest.raises(InvalidRequest, match="two sets are called"):
        check(bundle, reference=checkpoint, options=CheckOptions(sets=tuple(map(str, second)), limit=1))


def test_a_damaged_bundle_is_refused(bundle, checkpoint, tmp_path):
    folder = planted.copied(bundle, tmp_path / "damaged")
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenCheckpoint, match="is not as it was written: model.* changed"):
        check(folder, reference=checkpoint, options=FEW)


@pytest.mark.parametrize("memory", [None, 0])
def test_numbers_that_are_not_finite_fail(bundle, checkpoint, tmp_path, memory):
    folder = planted.copied(bundle, tmp_path / "overflown")
    planted.scale_layer(folder, 0, float("inf"))
    result = check(folder, reference=checkpoint, options=CheckOptions(limit=12, max_new_tokens=6, memory=memory))
    assert result.verdict.outcome == FAIL and any("not finite at" in each.reason for each in result.verdict.grounds)
    assert list((folder / "checks").glob("*/report.html"))


def test_other_options_are_another_check(bundle, checkpoint):
    before = len(list((bundle / "checks").iterdir())) if (bundle / "checks").exists() else 0
    for tokens in (3, 4):
        check(bundle, reference=checkpoint, options=CheckOptions(limit=2, max_new_tokens=tokens))
    assert len(list((bundle / "checks").iterdir())) == before + 2


def test_a_set_that_is_only_called_like_a_published_one(bundle, checkpoint, tmp_path):
    path, remarks = write_set(tmp_path).rename(tmp_path / "HallusionBench_mine.tsv"), []
    options = CheckOptions(sets=(str(path),), max_new_tokens=3, metric="exact")
    result = check(bundle, reference=checkpoint, options=options, report=lambda event: remarks.append(event.message))
    assert result.generated.set_scores == {} and any("scores of the whole set are left out" in each for each in remarks)


def test_batches_have_one_size_however_many_questions_share_a_picture():
    class OnePicture:
        name = "one"

        def groups(self):
            yield [next(BuiltinQuestions("builtin", limit=1, seed=0).groups())[0]] * (2 * ROWS + 3)

    assert [len(questions) for _, questions in question_batches([OnePicture()])] == [ROWS, ROWS, 3]


def test_a_full_disk_is_one_sentence(bundle, checkpoint, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("vlquant.asking.write_states", full)
    with pytest.raises(OutputRefused, match="--limit, or name a folder on a larger disk in the environment variable TMPDIR"):
        check(bundle, reference=checkpoint, options=FEW)


def test_no_questions_are_too_few(bundle, checkpoint):
    with pytest.raises(InvalidRequest, match="--limit 1 or more"):
        check(bundle, reference=checkpoint, options=CheckOptions(limit=0))
