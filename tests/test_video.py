"""Frames from a video file."""

import builtins

import av
import numpy as np
import pytest
from PIL import Image

from vlquant.errors import InvalidRequest, MissingDependency
from vlquant.runtime.video import read_frames
from vlquant.tiling import frame_indices

FPS, LENGTH, SIDE = 10, 30, 64


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Thirty frames, each brighter than the one before."""
    path = tmp_path_factory.mktemp("video") / "brighter.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for index in range(LENGTH):
            pixels = np.full((SIDE, SIDE, 3), brightness(index), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(index):
    return 20 + 7 * index


def indices_of(frames):
    """Which frames these are, told by their brightness."""
    return [round((np.asarray(frame).mean() - 20) / 7) for frame in frames]


@pytest.mark.parametrize("count", [1, 4, 8, 30, 40])
def test_frames_are_those_the_original_takes(video, count):
    frames = read_frames(video, count)
    assert indices_of(frames) == frame_indices(None, FPS, LENGTH - 1, count)
    assert all(isinstance(frame, Image.Image) and frame.mode == "RGB" and frame.size == (SIDE, SIDE) for frame in frames)


def test_a_stretch_in_seconds(video):
    frames = read_frames(video, 4, bound=(1.0, 2.0))
    assert indices_of(frames) == frame_indices((1.0, 2.0), FPS, LENGTH - 1, 4)
    assert min(indices_of(frames)) >= 10 and max(indices_of(frames)) <= 20


@pytest.mark.parametrize("bound", [(2.0, 1.0), (-1.0, 2.0), (50.0, 60.0)], ids=str)
def test_stretches_that_are_not_there_are_refused(video, bound):
    with pytest.raises(InvalidRequest, match="brighter.mp4"):
        read_frames(video, 4, bound=bound)


def test_no_frames_asked_for(video):
    with pytest.raises(InvalidRequest, match="1 or more"):
        read_frames(video, 0)


@pytest.mark.parametrize("content", [b"", b"this is no video", None], ids=["empty", "text", "missing"])
def test_files_that_are_no_video_are_refused(tmp_path, content):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="clip.mp4"):
        read_frames(path, 4)


def test_a_truncated_video_is_refused(video, tmp_path):
    path = tmp_path / "half.mp4"
    path.write_bytes(video.read_bytes()[:2000])
    with pytest.raises(InvalidRequest, match="half.mp4"):
        read_frames(path, 4)


def test_a_video_without_pictures_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InvalidRequest, match="sound.mp4"):
        read_frames(path, 4)


def test_without_decord_the_library_is_named(video, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name == "decord":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependency, match="decord"):
        read_frames(video, 4)
