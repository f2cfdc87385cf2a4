"""Video files in and out, frame by frame, with PyAV: an optional dependency, imported when a video is given."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from diffinst.errors import ConfigError, DataError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")

_ENCODER = "libx264"
# What the encoder calls its quality, 0 (lossless) to 51; at 18 the eye sees no loss.
_QUALITY = "18"
_FALLBACK_RATE = Fraction(25)
# The matrix between RGB and YUV that frames are converted with both ways (ITU-R BT.601, as ISO/IEC 23091-2 counts).
_BT601 = 6


@dataclass(frozen=True)
class Frame:
    """image: (height, width, 3) uint8 RGB, upright. pts: time in units of the video's time base, rising."""

    image: np.ndarray
    pts: int


@dataclass(frozen=True)
class Video:
    """An open video. num_frames: as its file says or its length suggests, None where neither does.

    rate: frames a second, on average. time_base: seconds a unit of `Frame.pts`. frames: to be read once.
    """

    num_frames: int | None
    rate: Fraction
    time_base: Fraction
    frames: Iterator[Frame]


def check_video_support() -> None:
    """Say in time what is missing.

    Raises:
        ConfigError: PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise ConfigError(
            "videos need PyAV, which is not installed. Run: python -m pip install 'diffinst-bench[video]'"
        )


@contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """Open the first picture stream of a file; frames are decoded as they are asked for.

    Raises:
        DataError: the file is not there, is no video or is damaged; the latter perhaps in the middle, from `frames`.
    """
    import av

    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a video ({error.strerror}); give another file") from error
    with container:
        if not container.streams.video:
            raise DataError(f"{path}: has no pictures: it is damaged, or holds sound alone; give another file")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or _FALLBACK_RATE
        # A rate that the time base cannot count would give frames one time.
        time_base = stream.time_base if stream.time_base and stream.time_base * rate <= 1 else 1 / Fraction(rate)
        num_frames = stream.frames
        if not num_frames and container.duration:
            num_frames = round(Fraction(container.duration, av.time_base) * rate)
        yield Video(num_frames or None, Fraction(rate), time_base, _decode(path, container, stream, time_base, rate))


def _decode(path: Path, container: Any, stream: Any, time_base: Fraction, rate: Fraction) -> Iterator[Frame]:
    import av

    count, start, last = 0, None, -1
    try:
        for frame in container.decode(stream):
            # Times count from the first frame; a frame without one comes a frame's length after the one before.
            following = last + max(1, round(1 / (rate * time_base))) if count else 0
            time = None if frame.pts is None else frame.pts * frame.time_base
            if time is not None and start is None:
                start = time - following * time_base
            pts = following if time is None or start is None else round((time - start) / time_base)
            last = max(pts, last + 1)
            image = frame.to_ndarray(format="rgb24")
            # A telephone on its side stores lying pictures, and by how much to turn them, anticlockwise.
            yield Frame(np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90))), last)
            count += 1
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: cannot be decoded after frame {count} ({error.strerror}); it is damaged") from error
    if not count:
        raise DataError(f"{path}: has no picture in it; give another file")


@contextmanager
def write_video(path: Path, *, rate: Fraction, time_base: Fraction) -> Iterator[Callable[[np.ndarray, int], None]]:
    """An MP4 file with H.264 pictures and no sound; the size is that of the first picture.

    Pictures whose sides are both even have the colour resolution that every player knows (4:2:0); H.264 cannot store
    others so, and they have full colour resolution (4:4:4), which some browsers do not play.

    Args:
        path: written from the start; playable when the context ends without an error.
        rate, time_base: of `Video`.
    Yields:
        A function that adds a picture, (height, width, 3) uint8 RGB, at a time in units of the time base.
    Raises:
        ConfigError: this PyAV has no H.264 encoder. OSError: the file cannot be written.
    """
    import av

    if _ENCODER not in av.codecs_available:
        raise ConfigError("this PyAV has no H.264 encoder (libx264). Run: python -m pip install --force-reinstall av")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream: Any = None

        def add(image: np.ndarray, pts: int) -> None:
            nonlocal stream
            if stream is None:
                stream = container.add_stream(_ENCODER, rate=rate, options={"crf": _QUALITY})
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p" if not (stream.height % 2 or stream.width % 2) else "yuv444p"
                stream.time_base = stream.codec_context.time_base = time_base
                stream.codec_context.colorspace = _BT601
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = pts, time_base
            container.mux(stream.encode(frame))

        yield add
        if stream is not None:
            container.mux(stream.encode(None))
