"""Frames that nobody asks for and no other needs are not decoded; those that are asked for stay the same."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from make_clips import pictures, write_clip
from seats_cli.media import Sampling, open_clip
from seats_cli.media import video as module
from seats_cli.media.index import VideoIndex
from seats_cli.media.nvdec import ON_CPU

GROUPS = {
    "plain.mp4": {"b_frames": 3},
    "open.mkv": {"b_frames": 3, "gop": 20, "x264": "open-gop=1"},
    "pyramid.mp4": {"b_frames": 7, "gop": 60, "x264": "b-pyramid=normal:ref=4:b-adapt=0"},
    "strict.mkv": {"b_frames": 5, "gop": 30, "x264": "b-pyramid=strict:weightb=1:b-adapt=0"},
    "refresh.mkv": {"b_frames": 2, "gop": 20, "x264": "intra-refresh=1"},
    "quick_refresh.mp4": {"b_frames": 0, "gop": 4, "x264": "intra-refresh=1"},
    "fields.mp4": {"b_frames": 2, "gop": 24, "x264": "tff=1"},
    "stream.ts": {"b_frames": 3, "gop": 24},
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames came of each packet."""
    counts: list[int] = []
    whole = module.decode

    def decode(packet: Any, guard: Any) -> Any:
        frames = whole(packet, guard)
        counts.append(len(frames or ()))
        return frames

    monkeypatch.setattr(module, "decode", decode)
    return counts


def read(path: Path, fps: float) -> tuple[list[np.ndarray], int, list[str]]:
    lines: list[str] = []
    one = replace(ON_CPU, threads=1)  # with several, what the decoder mends differs from time to time
    with open_clip(path, Sampling(fps=fps), warn=lines.append, decoding=one) as clip:
        frames = [frame for window in clip.video_windows(4) for frame in window.frames]  # type: ignore[union-attr]
        return frames, clip.frames_replaced, lines


def both(path: Path, fps: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    with monkeypatch.context() as patch:  # everything from the start of the file on
        patch.setattr(module, "_SKIPPING", ())
        patch.setattr(VideoIndex, "key_for", lambda self, row: -1)
        plain = read(path, fps)
    return plain, read(path, fps)


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_asked_for_is_the_same_to_the_bit(
    name: str, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / name, pictures(180, 96, 64), **GROUPS[name])
    for fps in (1.0, 3.0, 7.0, 30.0):
        counted.clear()
        plain, skipping = both(path, fps, monkeypatch)
        assert np.array_equal(plain[0], skipping[0])
        assert plain[1:] == skipping[1:]


def test_frames_are_skipped(
    clip_file: Callable[[str], Any], counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip_file("bframes.mp4").path
    plain, skipping = both(path, 2.0, monkeypatch)
    middle = len(counted) // 2
    assert sum(counted[middle:]) < 0.75 * sum(counted[:middle])
    assert np.array_equal(plain[0], skipping[0])


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("short.mp4", {"gop": 15}, 0.7),  # the frames asked for drift through the groups
        ("short.mkv", {"gop": 15, "codec": "mpeg4"}, 0.7),
        ("open.mkv", {"b_frames": 3, "gop": 15, "x264": "open-gop=1"}, 0.8),
        ("pictures.mov", {"codec": "mjpeg", "pixel_format": "yuvj420p"}, 0.1),  # each is a keyframe
    ],
)
def test_the_rest_of_a_group_is_passed_over(
    name: str,
    options: dict[str, Any],
    share: float,
    tmp_path: Path,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_clip(tmp_path / name, pictures(180, 96, 64), **options)
    plain, skipping = both(path, 2.0, monkeypatch)
    assert np.array_equal(plain[0], skipping[0])
    assert plain[1:] == skipping[1:]
    assert len(counted) - 180 < share * 180  # packets of the second time


def test_any_number_of_groups_is_passed_over(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mov", pictures(2400, 32, 32), codec="mjpeg", pixel_format="yuvj420p")
    with open_clip(path, Sampling(fps=15.0, max_frames=2000), warn=pytest.fail) as clip:
        assert sum(len(window.frame_times_s) for window in clip.video_windows(8)) == 1200


def test_a_seek_that_lands_early_is_made_up_for(
    tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mov, with frames out of order, lands a group before the one that it is asked for."""
    path = write_clip(tmp_path / "long.mp4", pictures(600, 96, 64), gop=50, b_frames=3)
    plain, skipping = both(path, 0.5, monkeypatch)
    assert np.array_equal(plain[0], skipping[0])
    assert len(counted) - 600 < 0.5 * 600


class Marked:
    """A packet with a new description of its track."""

    def __init__(self, packet: Any) -> None:
        self._packet = packet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def has_sidedata(self, name: str) -> bool:
        return name == "new_extradata"


def test_a_new_description_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg gives it with a packet, and the decoder needs it for those that follow."""
    path = write_clip(tmp_path / "short.mp4", pictures(180, 96, 64), gop=15)
    plain, _ = both(path, 2.0, monkeypatch)
    opened: list[int] = []
    whole = module.packets

    def packets(*args: Any) -> Iterator[Any]:
        opened.append(1)
        for place, packet in enumerate(whole(*args)):
            yield Marked(packet) if place == 44 and len(opened) == 1 else packet

    monkeypatch.setattr(module, "packets", packets)
    assert np.array_equal(read(path, 2.0)[0], plain[0])
    assert len(opened) == 2


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_file_that_calls_every_frame_a_keyframe(
    codec: str, b_frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / "keys.mp4", pictures(180, 96, 64), gop=15, codec=codec, b_frames=b_frames)
    data = path.read_bytes()
    assert data.count(b"stss") == 1
    path.write_bytes(data.replace(b"stss", b"free"))
    for fps in (1.0, 2.0, 7.0):
        plain, skipping = both(path, fps, monkeypatch)
        assert np.array_equal(plain[0], skipping[0])
        assert plain[1:] == skipping[1:]


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
def test_a_keyframe_that_the_decoder_mends(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what came before it, of which an empty decoder has nothing."""
    whole = write_clip(tmp_path / "whole.mkv", pictures(180, 96, 64), gop=15, codec=codec).read_bytes()
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "whole.mkv")) as container:
        keys = [packet for packet in container.demux(video=0) if packet.is_keyframe][1:]
    differ = 0
    for packet in keys:
        at = packet.pos + packet.size // 2
        (tmp_path / "bad.mkv").write_bytes(whole[:at] + rng.bytes(8) + whole[at + 8 :])
        plain, skipping = both(tmp_path / "bad.mkv", 3.3, monkeypatch)
        assert np.array_equal(plain[0], skipping[0])
        differ += not np.array_equal(plain[0], read(tmp_path / "whole.mkv", 3.3)[0])
    assert differ > len(keys) // 2  # the damage is seen


def test_a_file_that_is_not_as_its_index_says_is_read_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / "short.mp4", pictures(180, 96, 64), gop=15)
    plain, _ = both(path, 2.0, monkeypatch)
    starts: list[int] = []
    whole, scan = module.FrameReader._open, VideoIndex.key_for

    def opened(self: module.FrameReader) -> None:
        starts.append(1)
        whole(self)

    def shifted(self: VideoIndex, row: int) -> int:
        key = scan(self, row)
        self.keys[max(key, 0) :, 1] += key > 2  # no packet has this time
        return key

    monkeypatch.setattr(module.FrameReader, "_open", opened)
    monkeypatch.setattr(VideoIndex, "key_for", shifted)
    assert np.array_equal(read(path, 2.0)[0], plain[0])
    assert len(starts) == 2


def test_behind_damaged_keyframes_groups_are_passed_over_again(
    tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what refers to one looks as it would had the group before it been decoded."""
    path = write_clip(tmp_path / "short.mp4", pictures(300, 96, 64), gop=10, codec="mpeg4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in [packet for packet in container.demux(video=0) if packet.is_keyframe][3:11:3]:
            data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    plain, skipping = both(path, 2.0, monkeypatch)
    assert np.array_equal(plain[0], skipping[0])
    assert "3 damaged video packets" in plain[2][0]
    assert plain[1:] == skipping[1:]
    assert len(counted) - 300 < 0.7 * 300


@pytest.mark.parametrize("spoilt", [0.2, 0.37, 0.55, 0.7, 0.9])
def test_a_damaged_file_gives_what_it_gave(
    spoilt: float, clip_file: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(clip_file("bframes.mkv").path.read_bytes())
    at = int(spoilt * len(data))
    data[at : at + 2000] = np.random.default_rng(1).bytes(2000)
    path = tmp_path / "bad.mkv"
    path.write_bytes(data)
    for fps in (2.0, 10.0):
        plain, skipping = both(path, fps, monkeypatch)
        assert np.array_equal(plain[0], skipping[0])
        assert plain[1] == skipping[1]
