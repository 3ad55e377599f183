"""Frames of a video file, chosen as the original chooses them. Knows no model."""

import os
from dataclasses import replace
from pathlib import Path

from PIL import Image

from vlquant.errors import InvalidRequest, MissingDependency
from vlquant.request import Request, is_file
from vlquant.tiling import frame_indices


def read_frames(
    path: str | Path, count: int, *, bound: tuple[float, float] | None = None
) -> list[Image.Image]:
    """`count` RGB frames from the middles of equal stretches of a video, or of `bound` (start, end) in seconds of it.

    Raises MissingDependency without decord, InvalidRequest if the file is no video or holds no frame there.
    """
    try:
        import decord
    except ImportError as error:
        raise MissingDependency(
            "videos need the decord library, which is not installed; pip install decord, or pass frames as pictures"
        ) from error
    if count < 1:
        raise InvalidRequest(f"{count} frames cannot be taken from {path}; ask for 1 or more")
    if not is_file(Path(path)):
        raise InvalidRequest(f"{path}: there is no such video file; check the path")
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        last, fps = len(reader) - 1, float(reader.get_avg_fps())
    except (decord.DECORDError, RuntimeError) as error:
        raise InvalidRequest(f"{path}: not a video that can be read; convert it to MP4 (H.264)") from error
    if last < 0:
        raise InvalidRequest(f"{path}: the video holds no frames; check the file")
    if bound and not 0 <= bound[0] < bound[1]:
        raise InvalidRequest(f"{path}: seconds {bound[0]} to {bound[1]} are no stretch of a video; give start < end")
    indices = frame_indices(bound, fps, last, count)
    if max(indices) > last:
        raise InvalidRequest(f"{path}: the video ends at {(last + 1) / fps:.1f} s, before the stretch asked for")
    try:
        return [Image.fromarray(reader[index].asnumpy()).convert("RGB") for index in indices]
    except (decord.DECORDError, RuntimeError) as error:
        raise InvalidRequest(f"{path}: its frames cannot be decoded; convert it to MP4 (H.264)") from error


def with_frames(request: Request) -> Request:
    """`request` with its video file, if it names one, decoded. Raises as `read_frames`."""
    if not isinstance(request.video, str | os.PathLike):
        return request
    return replace(request, video=tuple(read_frames(request.video, request.frames)))
