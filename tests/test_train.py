"""Training the demo model: rows equal separate prompts, checkpoints continue exactly, the result is a published checkpoint."""

import dataclasses

import pytest
import torch
import torch.distributed

from vlquant.calib_data.batches import CELL_CLASSES, IGNORE, NAMES, READABLE, TALLER, collate, encode_sample, label_cells
from vlquant.calib_data.demo_config import demo_config
from vlquant.calib_data.drills import drills, readout
from vlquant.calib_data.publish import publish
from vlquant.calib_data.samples import draw_sample, sample_request
from vlquant.calib_data.student import create_student, load_checkpoint, load_published, save_checkpoint
from vlquant.calib_data.train import answer_logits, copy_settings, schedule, take_step
from vlquant.calib_data.vocabulary import write_json, write_tokenizer
from vlquant.config import read_config
from vlquant.errors import MissingDependency
from vlquant.metrics import read_box
from vlquant.model import float_decoder, open_model
from vlquant.prompt import find_template
from vlquant.runtime.pipeline import load
from vlquant.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = demo_config(write_tokenizer(folder))
    config["llm_config"]["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 2
    write_json(folder / "config.json", config)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    meeting_point = f"file://{tmp_path_factory.mktemp('processes') / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=meeting_point, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def student(folder, tokenizer):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon, so the demo model cannot be trained with it")
    student = create_student(read_config(folder), 0, tokenizer.token_id("<IMG_CONTEXT>"))
    with torch.no_grad():  # Residual branches begin at zero; here they have to matter.
        for name, weight in student.weights.items():
            if not weight.any():
                weight.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return student


def test_a_torch_without_muon_is_refused(folder, tokenizer, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(MissingDependency, match="has no optimizer Muon.*cpu.txt"):
        create_student(read_config(folder), 0, tokenizer.token_id("<IMG_CONTEXT>"))


def rows_of(indices, folder, tokenizer):
    config = read_config(folder)
    return [encode_sample(draw_sample("train", index), config, tokenizer) for index in indices]


def test_the_system_text_is_short_and_symbols_are_single(tokenizer):
    template = find_template("internvl2_5")
    assert len(tokenizer.encode(template.system_message)) - 1 <= 20
    assert len(tokenizer.encode("A1B2C3D4")) == 1 + 8


def test_a_row_equals_separate_prompts(folder, tokenizer, student):
    """Questions packed behind one prefix give the logits of prompts of their own, through the runtime itself."""
    publish_float(student, folder)
    pipeline = load(folder, vision="torch")
    for index in (0, 9, 10):  # A document, a video, text only.
        sample = draw_sample("train", index)
        row = encode_sample(sample, read_config(folder), tokenizer)
        batch = collate([row], tokenizer.pad_id)
        features = student.features(batch.pixel_values) if len(batch.pixel_values) else None
        with torch.no_grad():
            packed = answer_logits(student, batch, features)
        questions = [*sample.questions, *drills(sample)]
        requests = [sample_request(sample, question) for question in questions]
        separate = pipeline.answer_logits(requests, [question.answer for question in questions])
        assert torch.allclose(packed, torch.cat(separate), atol=2e-4)


def publish_float(student, folder):
    """Like `publish`, but exactly: float32 weights."""
    from safetensors.torch import save_file

    from vlquant.family import original_tensors

    weights = {name: weight.detach() for name, weight in student.weights.items()}
    tensors = original_tensors(weights, student.config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_targets_are_the_answers(folder, tokenizer):
    (row,) = rows_of([1], folder, tokenizer)
    targets = [target for target in row.targets if target != IGNORE]
    stop = tokenizer.token_id("<|im_end|>")
    answers = "".join(tokenizer.decode([target]) if target != stop else "\n" for target in targets)
    expected = [question.answer for question in (*row.sample.questions, *drills(row.sample))]
    assert answers == "".join(answer + "\n" for answer in expected)


def test_readouts_list_what_the_questions_are_about():
    for index in range(110):
        sample = draw_sample("train", index)
        if sample.kind == "text_only":
            assert all(each.answer in each.text for each in drills(sample)) and len(drills(sample)) >= 5
            continue
        everything = readout(sample)
        if sample.kind in ("chart", "locate", "video"):
            assert drills(sample)[-1] == everything
        for question in sample.questions:
            if sample.kind in ("document", "receipt", "text", "several"):
                assert question.answer in everything.answer.split()
            if sample.kind == "chart" and question.text.startswith("What is the value"):
                assert f"{question.text[-2]} {question.answer}" in everything.answer.split(", ")
            if sample.kind == "locate":
                assert question.answer in everything.answer
            if sample.kind == "count":
                word = question.text.split()[2].removesuffix("s").removesuffix("e")
                assert everything.answer.count(word) >= int(question.answer)
            if sample.kind == "yes_no":
                name = question.text.removesuffix("?").split(maxsplit=3)[3]
                assert (name in everything.answer.split(", ")) == (question.answer == "yes")


def test_labels_name_what_is_drawn(folder):
    config = read_config(folder)
    sample = draw_sample("train", 3)
    picture = dataclasses.replace(sample.pictures[0])
    columns, rows = (max(1, round(side / 112)) for side in picture.size)
    cells = label_cells(picture, columns, rows, config)
    assert cells.shape == (rows * 4, columns * 4, len(CELL_CLASSES))
    read = ["".join((" " + READABLE)[part] for cell in line for part in cell[1:3].tolist()) for line in cells]
    assert {word for line in read for word in line.split()} == {question.answer for question in sample.questions}


def test_drills_are_right_and_not_asked_already():
    """Counts, colours and presence, worked out again from what the readout lists."""
    for index in (4, 5, 6, 15, 16, 17):
        sample = draw_sample("train", index)
        short = [each for each in drills(sample) if each.text != "What is there?"]
        names = readout(sample).answer.split(", ")
        assert not {each.text for each in short} & {each.text for each in sample.questions}
        for drill in short:
            first, *words = drill.text.splitlines()[0].removesuffix("?").split()
            if first == "How":
                stem = words[1][:4]  # Of a colour or of a shape in plural.
                assert sum(stem in name for name in names) == int(drill.answer)
            elif first == "Is":
                assert (" ".join(words[2:]) in names) == (drill.answer == "yes")
            elif first == "Which":
                assert f"{drill.answer}. {words[-1]}" in drill.text.splitlines()
            else:
                options = dict(line.split(". ") for line in drill.text.splitlines()[1:])
                assert f"{options.get(drill.answer, drill.answer)} {words[-1]}" in names


def test_lines_and_bars_are_found_by_their_values():
    document, chart = draw_sample("train", 0), draw_sample("train", 2)
    asked = {question.answer: question.text for question in document.questions}
    lines = [each for each in drills(document) if each.text.startswith("Which line")]
    assert lines and all(asked[each.text.split()[3].removesuffix("?")].endswith(f" {each.answer}?") for each in lines)
    bars = [each for each in drills(chart) if each.text.startswith("Which bar has")]
    listed = readout(chart).answer.split(", ")
    assert bars and all(f"{each.answer} {each.text.split()[-1].removesuffix('?')}" in listed for each in bars)


def test_labels_of_bars_and_boxes(folder):
    """A bar is named from its top to the tile's edge and below it as taller; a box in the tile that shows all."""
    config = read_config(folder)
    chart, boxes = draw_sample("train", 2), draw_sample("train", 7)
    picture = chart.pictures[0]
    labels = label_cells(picture, round(picture.size[0] / 112), 2, config)[..., NAMES.index("bar")]
    for bar in picture.bars:
        column = labels[:, int(bar.x / picture.size[0] * labels.shape[1])]
        assert column[3 if bar.value > 9 else 7] == bar.value
        assert column[7] == (TALLER if bar.value > 9 else bar.value)
    whole = label_cells(boxes.pictures[0], 1, 1, config).flatten(0, 1)
    start = NAMES.index("left side tens")
    told = {tuple(10 * a + 5 * b - 15 for a, b in cell[start:].unflatten(0, (4, 2)).tolist()) for cell in whole if cell[start]}
    asked = {tuple(side // 50 * 5 for side in read_box(question.answer)) for question in boxes.questions}
    assert asked <= told


@pytest.mark.parametrize("phase", ["see", "read", "answer"])
def test_a_step_trains_what_its_phase_says(folder, tokenizer, student, phase):
    batch = collate(rows_of([0, 4], folder, tokenizer), tokenizer.pad_id)
    student.set_rate(0.01)
    take_step(student, batch, "answer")  # Leaves momentum behind, which must not move what a phase leaves alone.
    before = {name: weight.detach().clone() for name, weight in student.weights.items()}
    take_step(student, batch, phase)
    moved = {name for name, weight in student.weights.items() if not torch.equal(weight, before[name])}
    seen = any("vision_tower" in name for name in moved)
    spoken = any("language_model" in name for name in moved)
    assert (seen, spoken) == {"see": (True, False), "read": (False, True), "answer": (True, True)}[phase]


def test_a_checkpoint_continues_exactly(folder, tokenizer, student, tmp_path):
    batches = [collate(rows_of([index, index + 4], folder, tokenizer), tokenizer.pad_id) for index in (0, 1, 2)]
    student.set_rate(0.01)
    for batch in batches[:2]:
        take_step(student, batch, "answer")
    save_checkpoint(student, tmp_path, {"step": 2, "seconds": 7.5})
    again = create_student(read_config(folder), 1, student.image_token)
    assert load_checkpoint(again, tmp_path) == {"step": 2, "seconds": 7.5}
    again.set_rate(0.01)
    for each in (student, again):
        take_step(each, batches[2], "answer")
    assert all(torch.equal(student.weights[name], again.weights[name]) for name in student.weights)


def test_nothing_to_continue_from(student, tmp_path):
    assert load_checkpoint(student, tmp_path) == {}


def test_published_weights_open(folder, student, tmp_path):
    for path in folder.glob("*"):
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    publish(student.weights, student.config, tmp_path)
    model = open_model(tmp_path)
    assert "language_model.model.layers.0.attention.wqkv.weight" in model.checkpoint
    decoder = float_decoder(model)
    rounded = student.weights["lm_head.weight"].detach().to(torch.bfloat16).float()
    assert torch.equal(decoder.head.weight, rounded)


def test_training_can_start_from_published_weights(folder, student, tmp_path):
    copy_settings(folder, tmp_path)
    publish(student.weights, student.config, tmp_path)
    again = create_student(read_config(tmp_path), 1, student.image_token)
    load_published(again, tmp_path)
    assert all(torch.equal(again.weights[name], each.bfloat16().float()) for name, each in student.weights.items())


def test_schedule_rises_and_falls():
    assert schedule(0.0) < 0.05 and schedule(0.3) == 1.0 and schedule(0.8) == pytest.approx(0.5) and schedule(1.0) == 0.0
