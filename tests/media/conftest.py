"""Clips that several tests read, built once a session (see tests/make_clips.py to write more)."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from make_clips import decode_everything, pictures, tone, write_clip


class Sample(NamedTuple):
    """A file and every frame that it holds, (T,H,W,3) uint8 as decoded plainly (not turned upright)."""

    path: Path
    frames: np.ndarray


ONE_FILE = "mbtree=0"  # else x264 writes another file now and then, and damage falls elsewhere in it
SPECS: dict[str, dict] = {
    "plain.mp4": {"frames": 150, "gop": 30, "audio": 5.0},
    "bframes.mp4": {"frames": 240, "gop": 60, "b_frames": 3, "audio": 8.0},
    "bframes.mkv": {"frames": 240, "gop": 20, "b_frames": 3, "audio": 8.0, "x264": ONE_FILE},
    "open_gop.mkv": {"frames": 240, "gop": 20, "b_frames": 3, "x264": "open-gop=1"},
    "intra_refresh.mkv": {"frames": 240, "gop": 20, "x264": "intra-refresh=1"},
    "tiny_gops.mp4": {"frames": 120, "gop": 2, "b_frames": 1},
    "stream.ts": {"frames": 150, "gop": 30, "b_frames": 2, "audio": 5.0},
    "old.avi": {"frames": 90, "gop": 12, "codec": "mpeg4", "audio": 3.0, "audio_codec": "libmp3lame"},
    "web.webm": {"frames": 60, "codec": "libvpx-vp9", "audio": 2.0, "audio_codec": "libopus"},
    "raw.h264": {"frames": 60, "gop": 12},
    "turned.mp4": {"frames": 30, "rotation": -90},
    "late_start.mkv": {"frames": 90, "start_s": 2.0, "audio": 4.0, "audio_start_s": 2.5},
}


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sample]:
    """`clip_file("plain.mp4")`: a clip of `SPECS`."""
    folder = tmp_path_factory.mktemp("clips")
    made: dict[str, Sample] = {}

    def get(name: str) -> Sample:
        if name not in made:
            options = dict(SPECS[name])
            frames, seconds = pictures(options.pop("frames")), options.pop("audio", 0)
            path = write_clip(folder / name, frames, audio=tone(seconds) if seconds else None, **options)
            made[name] = Sample(path, decode_everything(path))
        return made[name]

    return get


@pytest.fixture
def lines() -> list[str]:
    """A list to pass the `append` of as `warn`."""
    return []
