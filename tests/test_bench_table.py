"""What a bench found, on a terminal and as a picture, and the files that it needs to write."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlquant import bench as bench_module
from vlquant import bench_table
from vlquant.bench_result import to_json
from vlquant.bench_table import plot_bench, print_bench, require_folder, require_picture
from vlquant.cli import app
from vlquant.errors import InvalidRequest

from tests.made_up_bench import MACHINE, SMALL, made_up


def printed(result):
    console = Console(file=io.StringIO(), width=80)
    print_bench(result, console)
    return console.file.getvalue()


def test_medians_quartiles_and_ratios():
    found = made_up()
    load, ours, peer, memory, alone = found.series
    assert (load.spread.median, load.spread.first_quartile, load.spread.third_quartile) == (2.0, 1.5, 2.5)
    assert (ours.spread.median, ours.spread.first_quartile, ours.spread.third_quartile) == (25.0, 17.5, 32.5)
    assert memory.spread.median == memory.spread.third_quartile == 1.5e9
    assert found.ratio(peer) == 2.0
    assert found.ratio(ours) is None and found.ratio(alone) is None


def test_the_table_has_every_number():
    text = printed(made_up())
    lines = [line.split() for line in text.splitlines()]
    assert ["vlquant", "25.0", "[17.5,", "32.5]"] in lines
    assert ["llama-cpp", "12.5", "[8.750,", "16.2]", "2.00"] in lines
    assert ["vlquant", "1500", "[1500,", "1500]"] in lines
    assert "not measured: openvino: absent [here]" in text and "llama-cpp: system VNNI = 1" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_table_explains_itself():
    text = " ".join(printed(made_up(machine=replace(MACHINE, cores=1, threads=1), options=replace(SMALL, rounds=1))).split())
    assert "in tokens/s, where more is better, ours is ahead above 1; in s and MB, where less is better, below 1" in text
    assert "openvino, float32 file 2.000" in text and "medians of 1 alternating round, with" in text
    assert "1 core, 1 thread each" in text and "2 cores, 2 threads each" in printed(made_up())
    assert [each["better"] for each in json.loads(to_json(made_up()))["series"]] == ["less", "more", "more", "less", "less"]


def test_the_chart_is_a_picture(tmp_path):
    plot_bench(made_up(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("name", "words"), [("bench.txt", "no name of a picture"), ("absent/bench.png", "make it first"), ("a.png", "is a folder"), ("/proc/x.png", "cannot be written to")])
def test_a_chart_that_cannot_be_written_is_refused_first(name, words, tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InvalidRequest, match=words):
        require_picture(tmp_path / name)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        plot_bench(made_up(), Path("/proc/x.png"))


def test_a_finished_measurement_is_printed_whatever_becomes_of_its_chart(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_module, "bench", lambda *arguments, **options: made_up())
    monkeypatch.setattr(bench_table, "require_picture", lambda path: None)
    done = CliRunner().invoke(app, ["bench", "a-bundle", "--plot", "/proc/x.png"], prog_name="vlquant")
    assert "prefill 512" in done.stdout and done.exit_code == 2 and "/proc/x.png cannot be written" in done.stderr


@pytest.mark.parametrize("keep", ["a file", "/proc/x"])
def test_a_folder_that_cannot_be_kept_is_refused_first(keep, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(InvalidRequest, match="cannot be written to"):
        require_folder(tmp_path / keep)


def test_a_narrow_terminal_loses_no_numbers(monkeypatch):
    monkeypatch.setattr(bench_module, "bench", lambda *arguments, **options: made_up())
    wide, narrow = (CliRunner(env={"COLUMNS": width}).invoke(app, ["bench", "a-bundle"]).stdout for width in ("80", "40"))
    assert narrow == wide and "[17.5, 32.5]" in narrow
