"""On an NVIDIA GPU that decodes video: its frames are the CPU's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from make_clips import pictures, write_clip
from seats_cli.media import Sampling, VideoDecoding, open_clip
from seats_cli.media.nvdec import why_not
from seats_cli.session import ModelOptions, Session

PROBLEM = why_not(0) or ("" if torch.cuda.is_available() else "torch has no CUDA")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)]
GPU = VideoDecoding(0, "asked for", insisted=True)
ALL_CHIPS = {  # what every NVDEC since 2016 decodes
    "plain.mp4": {},
    "bframes.mkv": {"b_frames": 3, "gop": 20},
    "open_gop.mkv": {"b_frames": 3, "gop": 20, "x264": "open-gop=1"},
    "many_references.mp4": {"b_frames": 8, "gop": 60, "x264": "ref=16:b-pyramid=normal"},
    "interlaced.mp4": {"gop": 20, "x264": "tff=1"},
    "full_range.mp4": {"pixel_format": "yuvj420p"},
    "turned.mp4": {"rotation": -90},
    "stream.ts": {"b_frames": 2},
    "raw.h264": {},
    "hevc.mp4": {"codec": "libx265"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
}


def read(path: Path, decoding: VideoDecoding, warn: Any = pytest.fail, **sampling: Any) -> tuple[Any, Any]:
    """The clip after it was read, and its frames (T,H,W,3)."""
    with open_clip(path, Sampling(**sampling), warn=warn, decoding=decoding) as clip:
        return clip, np.concatenate([window.frames for window in clip.video_windows(4)])


def noise(count: int, width: int, height: int) -> np.ndarray:
    """Pictures in which every block has its own colour, which moves: any wrong pixel shows."""
    rng = np.random.default_rng(0)
    still = np.kron(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))
    still = still[:height, :width].astype(np.uint8)
    return np.stack([np.roll(still, 3 * index, axis=1) for index in range(count)])


@pytest.mark.parametrize("sampling", [{}, {"max_frames": 4}, {"start_s": 1.2}], ids=str)
@pytest.mark.parametrize("name", ALL_CHIPS)
def test_frames_are_the_cpus(tmp_path: Path, name: str, sampling: dict[str, Any]) -> None:
    path = write_clip(tmp_path / name, noise(90, 322, 244), **ALL_CHIPS[name])
    _, expected = read(path, VideoDecoding(), **sampling)
    clip, frames = read(path, GPU, **sampling)
    assert clip.video_decoder == "nvdec", clip.decoder_used
    assert np.abs(frames.astype(np.int16) - expected).max() <= 1


def test_a_crop_at_the_left_and_top_is_seen(tmp_path: Path) -> None:
    """FFmpeg loses it with pictures that stay on the GPU; either way the frames are right."""
    path = write_clip(tmp_path / "c.mp4", noise(30, 320, 240), x264="crop-rect=16,8,0,0")
    lines: list[str] = []
    _, expected = read(path, VideoDecoding())
    clip, frames = read(path, GPU, lines.append)
    assert np.abs(frames.astype(np.int16) - expected).max() <= 1
    assert (clip.video_decoder == "cpu") == bool(lines)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("too_small.mp4", {}),  # below the decoder's least size
        ("old.avi", {"codec": "mpeg4"}),
        ("professional.mp4", {"pixel_format": "yuv422p"}),
        ("ten_bits.mkv", {"codec": "libx265", "pixel_format": "yuv420p10le"}),
        ("av1.mkv", {"codec": "libsvtav1"}),
    ],
)
def test_what_is_not_decoded_there_falls_back(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    size = (32, 16) if name == "too_small.mp4" else (320, 240)
    path = write_clip(tmp_path / name, pictures(30, *size), **options)
    lines: list[str] = []
    _, expected = read(path, VideoDecoding())
    clip, frames = read(path, GPU, lines.append)
    assert np.array_equal(frames, expected)
    if clip.video_decoder != "nvdec":
        assert len(lines) == 1
        assert "video decoded on the CPU: " in lines[0]
    else:
        assert name == "too_small.mp4"  # a chip may have more than the least


def test_damage_reads_as_on_the_cpu(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "d.mkv", noise(200, 320, 240), gop=20)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, expected = read(path, VideoDecoding(), lambda _: None)
    clip, frames = read(path, GPU, lambda _: None)
    assert np.abs(frames.astype(np.int16) - expected).max() <= 1
    assert clip.video_decoder in ("nvdec", "nvdec+cpu")


def test_the_sessions_own_gpu_decodes(tmp_path: Path) -> None:
    last = torch.cuda.device_count() - 1
    session = Session(ModelOptions(device=f"cuda:{last}", hwaccel="auto"))
    assert session.video_decoding.gpu == last
    path = write_clip(tmp_path / "c.mp4", noise(60, 336, 336))
    used = torch.cuda.mem_get_info(0)[0]
    report = session.ask(path, "what is said?").report
    assert report.media["video_decoder"] == "nvdec"
    assert last == 0 or torch.cuda.mem_get_info(0)[0] >= used - 2**26  # nothing was opened on another


def test_the_command_line_says_who_decoded(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "c.mp4", noise(60, 336, 336))
    command = [sys.executable, "-m", "seats_cli", "ask", "-v", "--json", path, "what is said?"]
    found = {}
    for where in ("none", "cuda"):
        done = subprocess.run([*command, "--hwaccel", where], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[where] = json.loads(done.stdout)
    assert "video decoded on GPU 0: asked for" in done.stderr
    assert found["none"]["media"]["video_decoder"] == "cpu"
    assert found["cuda"]["media"]["video_decoder"] == "nvdec"
    assert found["cuda"]["answer"] == found["none"]["answer"]
