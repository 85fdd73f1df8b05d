"""What a file may cost: refused before it hurts, and playlists never followed."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from make_clips import pictures, tone, write_clip, write_picture
from seats_cli.errors import MediaFormat, MediaLimit
from seats_cli.media import NO_LIMITS, Limits, Sampling, open_clip
from seats_cli.media import limits as module


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 s, 64x48, 30 frames, with sound."""
    path = tmp_path_factory.mktemp("limits") / "clip.mp4"
    return write_clip(path, pictures(30), fps=10, audio=tone(3.0))


def read(path: Path, limits: Limits, **sampling: Any) -> None:
    with open_clip(path, Sampling(**sampling), warn=lambda _: None, limits=limits) as found:
        for _ in found.video_windows(4):
            pass
        for _ in found.audio_blocks(16000):
            pass


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(size_bytes=1000), "bytes, beyond the limit of 1,000"),
        (Limits(duration_s=2.0), r"3\.?\d* s, beyond the limit of 2"),
        (Limits(pixels=3000), "pixels, beyond the limit of 3,000"),
        (Limits(frames=29), "30 frames, beyond the limit of 29"),
        (Limits(decode_s=0.0), "s of decoding, beyond the limit of 0"),
    ],
)
def test_each_limit_refuses_and_names_itself(clip: Path, limits: Limits, words: str) -> None:
    read(clip, Limits())
    read(clip, NO_LIMITS)
    with pytest.raises(MediaLimit, match=words) as met:
        read(clip, limits)
    assert str(clip) in str(met.value)
    assert "--limits" in str(met.value.hint)


def test_limits_are_reached_and_not_passed(clip: Path) -> None:
    exact = Limits(size_bytes=clip.stat().st_size, pixels=64 * 48, frames=30, duration_s=3.1)
    read(clip, exact)


def test_length_is_that_of_the_part_that_is_asked_about(clip: Path) -> None:
    read(clip, Limits(duration_s=1.5), start_s=0.5, end_s=2.0)
    read(clip, Limits(duration_s=1.5), start_s=1.8)
    with pytest.raises(MediaLimit):
        read(clip, Limits(duration_s=1.5), end_s=2.0)


def test_nothing_is_decoded_of_a_file_that_is_too_large(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seats_cli.media import probe

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(probe, "decode", never)
    for limits in (Limits(size_bytes=1000), Limits(pixels=3000)):
        with pytest.raises(MediaLimit):
            read(clip, limits)


def test_sound_that_does_not_say_how_long_it_is_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone(3.0)[0], 48000)
    with pytest.raises(MediaLimit, match="beyond the limit of 2"):
        read(path, Limits(duration_s=2.0))
    with pytest.raises(MediaLimit, match="s of decoding"):
        read(path, Limits(decode_s=0.0))


def test_a_picture_in_the_middle_is_not_decoded_beyond_the_limit(tmp_path: Path) -> None:
    """A stream of 64x48 whose second half says that it is 640x480: the decoder refuses to make room."""
    small = write_clip(tmp_path / "small.h264", pictures(12), fps=10).read_bytes()
    large = write_clip(tmp_path / "large.h264", pictures(12, 640, 480), fps=10).read_bytes()
    path = tmp_path / "both.h264"
    path.write_bytes(small + large)
    for limits, expected in ((NO_LIMITS, 24), (Limits(pixels=64 * 48), 12)):
        with open_clip(path, Sampling(), warn=lambda _: None, limits=limits) as found:
            assert found.info.native_frames == expected
            (window,) = found.video_windows(4)
            assert window.frames is not None
            assert window.frames.shape == (4, 48, 64, 3)


def test_images_are_limited_too(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", np.zeros((90, 120, 3), np.uint8), "png", "rgb24")
    with open_clip(path, limits=Limits(pixels=90 * 120)) as found:
        assert found.image().shape == (90, 120, 3)
    with pytest.raises(MediaLimit):
        open_clip(path, limits=Limits(pixels=90 * 120 - 1))


def test_time_is_counted_while_decoders_work_and_not_while_others_do(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that takes an hour a window costs the file nothing."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with open_clip(clip, warn=lambda _: None, limits=Limits(decode_s=1.0)) as found:
        for _ in found.video_windows(2):
            now[0] += 3600.0


PLAYLISTS: dict[str, Callable[[Path], str]] = {
    "list.m3u8": lambda clip: f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\n{clip}\n#EXT-X-ENDLIST\n",
    "list.ffconcat": lambda clip: f"ffconcat version 1.0\nfile '{clip}'\n",
    "list.mpd": lambda clip: f'<?xml version="1.0"?><MPD><Period><BaseURL>{clip}</BaseURL></Period></MPD>',
    "list.sdp": lambda clip: "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "list.pls": lambda clip: f"[playlist]\nFile1={clip}\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_is_never_followed(tmp_path: Path, clip: Path, name: str) -> None:
    for ending in (name, "disguised.mp4"):
        path = tmp_path / ending
        path.write_text(PLAYLISTS[name](clip))
        with pytest.raises(MediaFormat, match="a playlist"):
            open_clip(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_what_a_playlist_names_is_not_even_opened(tmp_path: Path) -> None:
    """It names a pipe; a writer finds out whether anybody has opened it to read."""
    pipe = tmp_path / "segment.ts"
    os.mkfifo(pipe)
    opened, done = threading.Event(), threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            try:
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # nobody reads
                continue
            opened.set()
            return

    looking = threading.Thread(target=look)
    looking.start()
    try:
        path = tmp_path / "list.m3u8"
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\nsegment.ts\n#EXT-X-ENDLIST\n")
        with pytest.raises(MediaFormat):
            open_clip(path)
    finally:
        done.set()
        looking.join()
    assert not opened.is_set()


def test_names_with_patterns_and_protocols_are_names(tmp_path: Path, clip: Path) -> None:
    for name in ("a%03d.mp4", "concat:b.mp4", "a*.mp4", "subfile,,start,0,end,9,,:x.mp4", "crypto:x.mp4"):
        path = tmp_path / name
        path.write_bytes(clip.read_bytes())
        read(path, Limits())
