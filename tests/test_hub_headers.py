"""A checkpoint on a hub is planned from configuration and headers, asked for by range: the server here counts what it sends."""

import threading
from dataclasses import replace
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlquant import members
from vlquant.checkpoint import open_checkpoint
from vlquant.errors import BrokenCheckpoint
from vlquant.hub_headers import fetch_headers
from vlquant.members import MEMBERS
from vlquant.plan import plan
from vlquant.shards import ShardWriter
from vlquant.synthesize import synthesize

from tests.narrow_members import narrow


class Hub:
    """Serves the folders below `root` as a hub does, on this machine."""

    def __init__(self, root):
        self.root, self.sent = root, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, *, body):
                owner, name, _, _, file = self.path.lstrip("/").split("/", 4)
                path = hub.root / owner / name / file
                if not path.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if path.parent.is_dir() else "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content, asked = path.read_bytes(), self.headers.get("Range")
                if asked:
                    first, last = asked.removeprefix("bytes=").split("-")
                    content = content[int(first) : int(last) + 1]
                self.send_response(206 if asked else 200)
                self.send_header("ETag", f'"{len(content)}-{path.name}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    hub.sent[file] = hub.sent.get(file, 0) + len(content)
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    serving = Hub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint=serving.url))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield serving
    serving.server.shutdown()
    serving.server.server_close()


def wide(name, monkeypatch):
    """A member with weights of some megabytes, so that a header is little beside them."""
    monkeypatch.setitem(members.MEMBERS, name, replace(narrow(name), hidden_size=128, intermediate_size=128))


@pytest.mark.parametrize("name", ["InternVL2_5-1B", "InternVL2_5-8B", "InternVL2-4B"])
def test_headers_alone_are_fetched_and_say_the_same(name, hub, tmp_path, monkeypatch):
    wide(name, monkeypatch)
    folder = synthesize(name, hub.root / "OpenGVLab" / name)
    here = plan(folder)
    heard = []
    there = plan(name, report=lambda event: heard.append(event.message))
    assert there.choices == here.choices
    size = (folder / "model.safetensors").stat().st_size
    assert size > 10e6 and hub.sent["model.safetensors"] <= 200_002
    assert set(hub.sent) == {"config.json", "model.safetensors"}
    assert "without downloading" in heard[0] and "headers on the hub" in there.remarks[0]
    assert not (tmp_path / "cache").exists()


def test_shards_are_asked_one_by_one(hub, tmp_path, monkeypatch):
    wide("InternVL2_5-1B", monkeypatch)
    whole = synthesize("InternVL2_5-1B", tmp_path / "whole")
    folder = hub.root / "somebody" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    writer, checkpoint = ShardWriter(folder, shard_bytes=2**23), open_checkpoint(whole)
    for tensor in checkpoint:
        writer.add(tensor, checkpoint.read(tensor))
    writer.close()
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 2
    found = plan("somebody/mine")
    assert found.choices == plan(whole).choices and shards < set(hub.sent)
    assert sum(hub.sent[shard] for shard in shards) <= 100_001 * len(shards) < sum((folder / shard).stat().st_size for shard in shards)


def test_what_is_fetched_is_a_checkpoint_without_tensors(hub, tmp_path, monkeypatch):
    wide("InternVL2_5-1B", monkeypatch)
    folder = synthesize("InternVL2_5-1B", hub.root / "a" / "b")
    (tmp_path / "headers").mkdir()
    fetch_headers("a/b", tmp_path / "headers")
    one, other = open_checkpoint(folder), open_checkpoint(tmp_path / "headers", whole=False)
    assert set(one) == set(other)
    assert all((one.shape(name), one.dtype(name)) == (other.shape(name), other.dtype(name)) for name in one)
    with pytest.raises(BrokenCheckpoint, match="truncated"):
        open_checkpoint(tmp_path / "headers")


def test_a_model_that_is_not_on_the_hub(hub):
    with pytest.raises(BrokenCheckpoint, match="the hub has no config.json of nobody/nothing"):
        plan("nobody/nothing")


def test_a_model_without_safetensors(hub, monkeypatch):
    wide("InternVL2_5-1B", monkeypatch)
    folder = synthesize("InternVL2_5-1B", hub.root / "a" / "pickled")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match="a/pickled") as caught:
        plan("a/pickled")
    assert "\n" not in str(caught.value)


def test_a_damaged_index_is_named_by_its_place_on_the_hub(hub, monkeypatch):
    wide("InternVL2_5-1B", monkeypatch)
    folder = synthesize("InternVL2_5-1B", hub.root / "a" / "odd")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match="^a/odd/model.safetensors.index.json has no weight_map"):
        plan("a/odd")


def test_without_a_network_known_models_are_planned_from_their_shapes(monkeypatch):
    from huggingface_hub import HfApi

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "file_exists", unreachable)
    found = plan("InternVL2_5-8B")
    assert found.choices and "published shapes of InternVL2_5-8B" in found.remarks[0] and "no route to host" in found.remarks[0]
    assert plan("OpenGVLab/InternVL2_5-8B").choices == found.choices
    assert len(MEMBERS) == len([plan(name) for name in MEMBERS])
    with pytest.raises(BrokenCheckpoint, match="no route to host.*check name and network"):
        plan("somebody/else")
    with pytest.raises(BrokenCheckpoint):
        plan("InternVL3-9B")  # Published, but its shape is known to its config.json alone.
