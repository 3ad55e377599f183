"""A command that is told to end cleans up as after Ctrl-C, and takes along what it started."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlquant.calib_data import demo_model
from vlquant.ending import end_in_order
from vlquant.quantize import quantize
from vlquant.recipe import Recipe

ROOT = Path(__file__).parents[1]
WAITING = """
import tempfile, time
import vlquant.cli
from vlquant.ending import end_in_order
end_in_order()
with tempfile.TemporaryDirectory():
    try:
        print("ready", flush=True)
        while line := input():
            print("still here", flush=True)
    finally:
        print("cleaning", flush=True)
        time.sleep(0.3)
        print("cleaned", flush=True)
"""


@contextmanager
def running(arguments, folder, **options):
    """A Python process with its temporary files in `folder`; it is gone at the end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, text=True, **pipes, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_a_signal_ends_cleans_up(number, code, tmp_path):
    with running(["-c", WAITING], tmp_path) as process:
        assert process.stdout.readline() == "ready\n" and len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(number)  # As `timeout` does: to the process, and to its group.
        assert process.communicate() == ("cleaned\n", "")
    assert process.returncode == code and list(tmp_path.iterdir()) == []


def test_what_is_ignored_stays_ignored(tmp_path):
    """nohup."""
    with running(["-c", WAITING], tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.stdin.write("?\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still here\n"


def test_other_threads_and_imports_change_nothing():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    thread = threading.Thread(target=end_in_order)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    code = "import signal, vlquant.cli, vlquant.contestant; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "True\n"


def test_a_bench_leaves_neither_files_nor_processes(tmp_path):
    bundle = quantize(demo_model(), recipe=Recipe(method="rtn"), output=tmp_path / "bundle")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = ["--measure", "decode", "--against", "none", "--contexts", "16", "--tokens", "2", "--rounds", "100000", "--json"]
    with running(["-m", "vlquant", "bench", str(bundle), *options], temporary) as process:
        assert any('"stage": "decode after 16"' in line for line in process.stderr)
        assert list(temporary.glob("vlquant-bench-*"))
        [contestant] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        assert "Traceback" not in process.communicate()[1]
    assert process.returncode == 143 and list(temporary.iterdir()) == []
    assert not Path(f"/proc/{contestant}").exists()
