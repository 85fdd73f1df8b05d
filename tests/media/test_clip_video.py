"""Frames: exactly those of a full decode, whatever the container, the range and the window size."""

import gc
import os
import weakref
from dataclasses import replace

import av
import numpy as np
import pytest

from conftest import SPECS
from make_clips import pictures, tone, write_clip
from seats_cli.errors import MediaFormat, MediaRange
from seats_cli.media import Sampling, open_clip
from seats_cli.media.container import open_container, packets
from seats_cli.media.index import scan
from seats_cli.media.limits import NO_LIMITS, Guard
from seats_cli.media.nvdec import ON_CPU
from seats_cli.media.probe import probe
from seats_cli.media.sampling import frame_indices
from seats_cli.media.video import FrameReader


def read(path, per_window=4, warn=None, **sampling):
    with open_clip(path, Sampling(**sampling), warn=warn or pytest.fail) as clip:
        found = list(clip.video_windows(per_window))
        return clip, found, np.concatenate([window.frames for window in found])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("max_frames", [4, 768])
def test_frames_equal_a_full_decode(clip_file, name, max_frames):
    """4 frames of a clip make the reader seek where the container allows it; 768 make it decode through."""
    path, everything = clip_file(name)
    clip, _, frames = read(path, max_frames=max_frames)
    indices, sample_fps = frame_indices(
        len(everything), clip.info.native_fps, Sampling(max_frames=max_frames)
    )
    wanted = np.rot90(everything[indices], k=clip.info.rotation // 90, axes=(1, 2))
    assert clip.info.native_frames == len(everything)
    assert np.array_equal(frames, wanted)
    assert clip.sample_fps == pytest.approx(sample_fps)
    rounding = 0.034 if name == "old.avi" else 0.002  # avi counts from the decoding time of the first frame
    assert clip.frame_times_s == pytest.approx(indices / 30, abs=rounding)
    assert clip.frames_replaced == 0


@pytest.mark.parametrize("name", ["bframes.mp4", "bframes.mkv", "open_gop.mkv", "tiny_gops.mp4"])
def test_every_single_frame_is_exact_after_a_seek(clip_file, name):
    path, everything = clip_file(name)
    file = probe(path, pytest.fail)
    index = scan(file, file.video, 0.0, None)
    for row in range(0, len(everything), 7):
        with FrameReader(file, file.video, index) as reader:
            assert np.array_equal(reader.read(row), everything[row])
            assert reader.replaced == []


def test_sparse_frames_skip_groups_that_hold_none(clip_file, monkeypatch):
    """The point of seeking: few packets are decoded for few frames, and the plain way decodes them all."""
    path, everything = clip_file("bframes.mkv")
    file = probe(path, pytest.fail)
    index = scan(file, file.video, 0.0, None)
    fed = {}
    for may_seek in (True, False):
        count = 0

        def counting(container, stream, guard):
            nonlocal count
            for packet in packets(container, stream, guard):
                count += 1
                yield packet

        monkeypatch.setattr("seats_cli.media.video.packets", counting)
        with FrameReader(file, file.video, index) as reader:
            reader._may_seek = may_seek
            for row in (0, 120, 200):
                assert np.array_equal(reader.read(row), everything[row])
        fed[may_seek] = count
    assert fed[True] < fed[False] / 2
    assert fed[False] > 200


@pytest.mark.parametrize("per_window", [1, 2, 5, 100])
def test_any_window_size_gives_the_same_frames(clip_file, per_window):
    path, _ = clip_file("bframes.mp4")
    _, _, reference = read(path, 2)
    clip, found, frames = read(path, per_window)
    assert np.array_equal(frames, reference)
    assert [window.index for window in found] == list(range(len(found)))
    assert all(len(window.frames) == per_window for window in found[:-1])
    assert np.array_equal(np.concatenate([window.frame_times_s for window in found]), clip.frame_times_s)
    assert all(window.start_s == window.frame_times_s[0] for window in found)


def test_a_clip_reads_again_the_same(clip_file):
    path, _ = clip_file("plain.mp4")
    with open_clip(path, warn=pytest.fail) as clip:
        first, second = ([window.frames for window in clip.video_windows(4)] for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_windows_are_not_read_ahead_or_kept(clip_file):
    """At most the window in hand is alive, whatever the clip's length."""
    path, _ = clip_file("bframes.mp4")
    with open_clip(path, warn=pytest.fail) as clip:
        alive = []
        for window in clip.video_windows(2):
            alive.append(weakref.ref(window.frames))
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 2  # the last one, while the loop rebinds
            del window
    assert len(alive) == 8


@pytest.mark.parametrize("name", ["bframes.mp4", "bframes.mkv", "stream.ts", "late_start.mkv"])
@pytest.mark.parametrize(("start_s", "end_s"), [(1.01, 2.49), (None, 1.0), (2.5, None), (2.7, 2.9)])
def test_ranges(clip_file, name, start_s, end_s):
    path, everything = clip_file(name)
    clip, _, frames = read(path, start_s=start_s, end_s=end_s)
    times = np.arange(len(everything)) / 30
    inside = np.flatnonzero((times >= (start_s or 0) - 0.001) & (times <= (end_s or 99) + 0.001))
    picked, _ = frame_indices(len(inside), clip.info.native_fps, Sampling())
    assert np.array_equal(frames, everything[inside[picked]])
    assert clip.frame_times_s == pytest.approx(times[inside[picked]] - (start_s or 0), abs=0.002)
    end = end_s or len(times) / 30 + (1.5 if name == "late_start.mkv" else 0)  # its audio goes on for longer
    assert clip.info.duration_s == pytest.approx(end - (start_s or 0), abs=0.05)


def test_a_range_far_in_does_not_read_the_file_before_it(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mkv", pictures(900, 32, 32), gop=30)
    seen = []

    def watching(container, stream, guard):
        for packet in packets(container, stream, guard):
            seen.append(packet.pts)
            yield packet

    monkeypatch.setattr("seats_cli.media.video.packets", watching)
    _, _, frames = read(path, start_s=20.0, end_s=22.0)
    assert len(frames) == 4
    stamps = [pts for pts in seen if pts is not None]
    assert min(stamps) >= 17_000
    assert max(stamps) <= 23_000


@pytest.mark.parametrize(
    ("start_s", "end_s", "words"),
    [(99.0, None, "the clip lasts 5.0 s"), (99.0, 100.0, "nothing in the range 99 s to 100 s")],
)
def test_ranges_outside_the_file(clip_file, start_s, end_s, words):
    with pytest.raises(MediaRange) as error:
        open_clip(clip_file("plain.mp4").path, Sampling(start_s=start_s, end_s=end_s), warn=pytest.fail)
    assert words in error.value.message
    assert error.value.hint


def test_an_end_past_the_file_is_said(clip_file, lines):
    clip, _, _ = read(clip_file("plain.mp4").path, warn=lines.append, start_s=3.0, end_s=60.0)
    assert clip.info.duration_s == pytest.approx(2.0, abs=0.05)
    assert len(lines) == 1
    assert "before the asked end of 60 s" in lines[0]


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_variable_rate_is_sampled_by_time(tmp_path, suffix):
    times = np.cumsum([0.0] + [0.02, 0.02, 0.02, 0.1] * 40)
    path = write_clip(tmp_path / f"v.{suffix}", pictures(len(times)), times_s=times, gop=20, b_frames=2)
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip, _, frames = read(path)
    assert clip.info.variable_rate
    spacing = np.diff(clip.frame_times_s)
    assert spacing == pytest.approx(np.full(len(spacing), spacing.mean()), abs=0.11)
    rows = [int(np.abs(times - t).argmin()) for t in clip.frame_times_s]
    assert clip.frame_times_s == pytest.approx(times[rows], abs=0.002)
    assert np.array_equal(frames, np.stack([shown[row] for row in rows]))
    assert clip.sample_fps == pytest.approx(2.0, rel=0.1)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_one_thread_is_one(clip_file):
    """Neither decoding nor the conversion to RGB starts others."""
    decoding = replace(ON_CPU, threads=1)
    with open_clip(clip_file("bframes.mp4").path, Sampling(), warn=pytest.fail, decoding=decoding) as clip:
        before = set(os.listdir("/proc/self/task"))
        stream = clip.video_windows(2)
        next(stream)
        assert set(os.listdir("/proc/self/task")) <= before
        stream.close()


def test_a_held_frame_fills_its_time(tmp_path):
    """A screen recording: the range begins and ends inside one long-held frame."""
    times = [0.0, 0.1, 0.2, 6.0, 6.1, 6.2]
    path = write_clip(tmp_path / "held.mkv", pictures(6), times_s=times, gop=3)
    clip, _, _ = read(path, start_s=3.0, end_s=6.15)
    assert clip.info.native_frames == 3
    assert clip.frame_times_s[0] == 0.0
    assert clip.frame_times_s[-1] >= 3.0


@pytest.mark.parametrize(("rotation", "corner"), [(90, 1), (-90, 2), (180, 3)])
def test_rotation_sets_frames_upright(tmp_path, rotation, corner):
    """Corners are red, green, blue, black in reading order; `corner` comes to the top left."""
    path = write_clip(tmp_path / "r.mp4", pictures(8)[:, :, :, :], rotation=rotation)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == rotation or abs(rotation) == 180
    clip, _, frames = read(path)
    turned = rotation % 180 == 90
    assert frames.shape[1:3] == ((64, 48) if turned else (48, 64))
    assert (clip.info.width, clip.info.height) == ((48, 64) if turned else (64, 48))
    assert "turned" in clip.video_used
    top_left = frames[0, 3, 3].astype(int)
    assert top_left.argmax() == corner or (corner == 3 and top_left.max() < 60)


def test_time_zero_is_common_to_both_tracks(clip_file):
    """Video from 2.0 s and audio from 2.5 s on the file's clock: half a second of silence comes first."""
    with open_clip(clip_file("late_start.mkv").path, warn=pytest.fail) as clip:
        assert clip.frame_times_s[0] == 0.0
        samples = np.concatenate(list(clip.audio_blocks(1000)))
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    assert loud[0] / 16000 == pytest.approx(0.5, abs=0.03)


def test_a_single_frame_is_an_error_or_leaves_the_audio(tmp_path, lines):
    alone = write_clip(tmp_path / "one.mp4", pictures(1))
    with pytest.raises(MediaRange) as error:
        open_clip(alone, warn=lines.append)
    assert str(alone) in error.value.message
    with_audio = write_clip(tmp_path / "two.mp4", pictures(1), audio=tone(1.0))
    with open_clip(with_audio, warn=lines.append) as clip:
        assert clip.info.kind == "audio"
        assert clip.n_samples >= 16000
        assert list(clip.video_windows(2)) == []
    assert any("single frame" in line for line in lines)


def test_a_short_clip_still_gives_frames(tmp_path):
    _, _, frames = read(write_clip(tmp_path / "short.mp4", pictures(3)))
    assert len(frames) == 2


def test_a_change_of_size_keeps_the_first_size(tmp_path):
    small = write_clip(tmp_path / "a.ts", pictures(30, 64, 48), gop=10)
    large = write_clip(tmp_path / "b.ts", pictures(30, 96, 64), gop=10, start_s=1.0)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    clip, _, frames = read(joined, min_frames=8)
    assert frames.shape == (8, 48, 64, 3)
    assert clip.info.native_frames == 60


def test_damage_in_the_middle_is_stepped_over(tmp_path, lines):
    path = write_clip(tmp_path / "d.mp4", pictures(300), gop=30)
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in spans[100:130]:
        data[position : position + size] = b"\x00" * size
    path.write_bytes(data)
    clip, _, frames = read(path, warn=lines.append)
    assert len(frames) == len(clip.frame_times_s) == 20
    assert any("damaged video packet" in line for line in lines)
    assert 1 <= clip.frames_replaced <= 5
    assert any("do not decode" in line for line in lines)


def test_a_tail_that_does_not_decode_repeats_the_last_good_frame(tmp_path, lines):
    path = write_clip(tmp_path / "tail.mp4", pictures(300), gop=30)
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in spans[150:]:
        data[position : position + size] = b"\x00" * size
    path.write_bytes(data)
    clip, _, frames = read(path, warn=lines.append)
    assert np.array_equal(frames[-1], frames[-2])
    assert not np.array_equal(frames[0], frames[1])
    assert clip.frames_replaced in (9, 10)
    assert any("only the first 4." in line and "of 10.0 s" in line for line in lines)


def test_a_range_without_a_frame_that_decodes(tmp_path):
    path = write_clip(tmp_path / "void.mkv", pictures(120), gop=12)
    with open_container(path, Guard(path, NO_LIMITS)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in spans[1:]:
        start = data.find(b"\x00\x00", position, position + 20)
        data[start + 4 : position + size] = b"\xff" * (position + size - start - 4)
    path.write_bytes(data)
    with pytest.raises((MediaFormat, MediaRange)) as error:
        read(path, warn=lambda line: None, start_s=2.0, end_s=3.0)
    assert error.value.hint


def test_nothing_is_left_open(clip_file):
    path, _ = clip_file("bframes.mp4")

    def handles():
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}") == os.path.realpath(path)
            for fd in os.listdir("/proc/self/fd")
        )

    clip = open_clip(path, warn=pytest.fail)
    assert handles() == 0
    windows, blocks = clip.video_windows(2), clip.audio_blocks(100)
    next(windows)
    next(blocks)
    assert handles() >= 1
    clip.close()
    assert handles() == 0
    assert list(windows) == []
    with pytest.raises(ValueError, match="closed"):
        clip.video_windows(2)
