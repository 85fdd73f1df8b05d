"""Clips decoded by another process: the same frames, samples, facts, warnings and errors; and its deaths."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.reduction import send_handle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from make_clips import add_exif_orientation, pictures, tone, write_clip, write_picture
from seats_cli.errors import MediaError, MediaFormat, MediaLimit, SeatsError
from seats_cli.media import DecoderProcess, Limits, Sampling, open_clip, worker
from seats_cli.media import video as video_module
from seats_cli.media.nvdec import VideoDecoding
from seats_cli.media.ring import Lender, new_memory

pytestmark = pytest.mark.skipif(os.name != "posix", reason="memory is handed over as a file descriptor")

FACTS = (
    "info",
    "sample_fps",
    "n_samples",
    "video_used",
    "audio_used",
    "readable_fraction",
    "frames_replaced",
    "video_decoder",
    "decoder_used",
)


@pytest.fixture(scope="module")
def decoder() -> Iterator[DecoderProcess]:
    """One process for all tests that do it no harm, as a batch has it."""
    with DecoderProcess() as process:
        yield process


def read(opener: Callable[..., Any], path: Path, size: int = 4, **sampling: Any) -> dict[str, Any]:
    """All that a clip gives, or the error that it ends in, and the lines that it warns with."""
    lines: list[str] = []
    found: dict[str, Any] = {"lines": lines}
    try:
        with opener(path, Sampling(**sampling), warn=lines.append) as clip:
            if clip.info.kind == "image":
                found["image"] = clip.image()
            found["times"] = clip.frame_times_s
            windows = list(clip.video_windows(size))
            found["windows"] = [(window.index, window.start_s) for window in windows]
            found["frames"] = [window.frames for window in windows]
            found["window_times"] = [window.frame_times_s for window in windows]
            found["blocks"] = list(clip.audio_blocks(20_000))
            found["again"] = list(clip.audio_blocks(16_000))
            found["facts"] = {name: getattr(clip, name) for name in FACTS}
    except SeatsError as error:
        found["error"] = (type(error), str(error), error.hint)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def changed(path: Path, keep: float = 1.0, spoil: float | None = None) -> Path:
    """The file with its end cut off, or with noise over a part of it."""
    data = bytearray(path.read_bytes()[: int(path.stat().st_size * keep)])
    if spoil is not None:
        at = int(len(data) * spoil)
        data[at : at + 3000] = bytes(range(256)) * 12
    path.write_bytes(data)
    return path


def files(folder: Path) -> dict[str, Path]:
    """One file of each kind."""
    moving, sound = pictures(60), tone(4.0)
    rng = np.random.default_rng(0)
    uneven = np.cumsum(rng.uniform(0.02, 0.2, 60)).tolist()
    picture = write_picture(folder / "picture.png", moving[3], "png", "rgb24")
    turned = write_picture(folder / "turned.jpg", moving[5], "mjpeg", "yuvj420p")
    turned.write_bytes(add_exif_orientation(turned.read_bytes(), 6))
    soundfile.write(folder / "sound.flac", sound.T, 48_000)
    (folder / "noise.mp4").write_bytes(rng.bytes(5000))
    return {
        "plain": write_clip(folder / "plain.mp4", moving, b_frames=2, audio=sound),
        "turned": write_clip(folder / "turned.mp4", moving, rotation=-90),
        "variable": write_clip(folder / "variable.mkv", moving, times_s=uneven, audio=sound),
        "truncated": changed(write_clip(folder / "cut.mkv", moving, audio=sound), keep=0.6),
        "damaged": changed(write_clip(folder / "bad.ts", pictures(90), gop=45), spoil=0.5),
        "late": write_clip(folder / "late.mkv", moving, start_s=2.0, audio=sound, audio_start_s=2.5),
        "sound": folder / "sound.flac",
        "picture": picture,
        "turned picture": turned,
        "noise": folder / "noise.mp4",
        "absent": folder / "absent.mp4",
    }


def test_everything_is_as_in_this_process(decoder: DecoderProcess, tmp_path: Path) -> None:
    met = set()
    for name, path in files(tmp_path).items():
        here, there = read(open_clip, path), read(decoder.open, path)
        assert same(here, there), (name, here.get("error"), there.get("error"), here["lines"], there["lines"])
        met |= {key for key, value in here.items() if isinstance(value, np.ndarray) or value}
    assert met > {"frames", "blocks", "image", "error", "lines"}


@pytest.mark.parametrize("threads", [1, 3])
def test_how_many_threads_decode_changes_no_frame(threads: int, tmp_path: Path) -> None:
    with DecoderProcess(threads=threads) as process:
        for name, path in files(tmp_path).items():
            assert same(read(open_clip, path), read(process.open, path)), name


def test_the_threads_of_a_decoder_are_those_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(20))
    used: list[int] = []
    real = video_module.packets

    def noted(container: Any, stream: Any, guard: Any) -> Any:
        used.append(stream.codec_context.thread_count)
        return real(container, stream, guard)

    monkeypatch.setattr(video_module, "packets", noted)
    for threads in (1, 3):
        with open_clip(path, Sampling(), warn=pytest.fail, decoding=VideoDecoding(threads=threads)) as clip:
            used.clear()
            assert len(list(clip.video_windows(100))) == 1
            assert used == [threads]

    def asked(_: Any, *values: Any) -> None:
        raise MediaError(str(VideoDecoding(threads=3) in values))

    monkeypatch.setattr("seats_cli.media.process._Desk.ask", asked)
    with DecoderProcess(threads=3) as process, pytest.raises(MediaError, match="True"):
        process.open(path, warn=pytest.fail)


def test_a_range_and_other_sizes_of_window(decoder: DecoderProcess, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(90), audio=tone(3.0))
    for size in (1, 3, 100):
        for asked in ({}, {"start_s": 1.0, "end_s": 2.2, "fps": 5.0}, {"start_s": 50.0}):
            here = read(open_clip, path, size, **asked)
            assert same(here, read(decoder.open, path, size, **asked))


def test_a_relative_path_is_that_of_this_process(
    decoder: DecoderProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "here.mp4", pictures(30))
    monkeypatch.chdir(tmp_path)
    with decoder.open("here.mp4", warn=print) as clip:
        assert clip.info.path == "here.mp4"


def test_windows_keep_their_pixels_for_as_long_as_they_are_held(
    decoder: DecoderProcess, tmp_path: Path
) -> None:
    """More windows than there are slots, some of them let go out of order."""
    path = write_clip(tmp_path / "a.mp4", pictures(240), gop=24)
    with open_clip(path, Sampling(fps=30.0)) as clip:
        plain = [window.frames for window in clip.video_windows(2)]
    with decoder.open(path, Sampling(fps=30.0), warn=print) as clip:
        held = {window.index: window.frames for window in clip.video_windows(2) if window.index % 3}
        assert len(held) > 40
        again = [window.frames.copy() for window in clip.video_windows(2) if window.frames is not None]
    decoder.open(path, warn=print).close()
    assert all(np.array_equal(plain[index], frames) for index, frames in held.items())
    assert same(plain, again)


def test_slots_are_lent_until_nobody_holds_them_and_never_all() -> None:
    ring = Lender(new_memory(4 * 4096), 4, 4096)
    first = ring.take(0, (2, 3), np.float32)
    part = first[1:]
    second, third = ring.take(1, (8,), np.uint8), ring.take(2, (8,), np.uint8)
    assert ring.returned() == [2]  # copied: one more, and the other side could not go on
    ring.array(2, (8,), np.uint8)[:] = 7
    ring.array(1, (8,), np.uint8)[:] = 5
    assert not third.any()
    assert (second == 5).all()
    del first
    assert ring.returned() == []
    del part
    assert ring.returned() == [0]
    with pytest.raises(ValueError, match="do not fit"):
        ring.take(0, (4097,), np.uint8)


def test_both_streams_at_once_and_one_that_is_left(decoder: DecoderProcess, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(120), audio=tone(4.0))
    with open_clip(path) as clip:
        expected = list(clip.audio_blocks(1000)), [window.frames for window in clip.video_windows(2)]
    with decoder.open(path, warn=print) as clip:
        frames, sounds = clip.video_windows(2), clip.audio_blocks(1000)
        next(iter(frames))
        next(iter(sounds))
        got: dict[str, Any] = {}
        threads = [
            threading.Thread(target=lambda: got.update(sounds=list(clip.audio_blocks(1000)))),
            threading.Thread(target=lambda: got.update(frames=[w.frames for w in clip.video_windows(2)])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert same(got, {"sounds": expected[0], "frames": expected[1]})
        with pytest.raises(ValueError, match="ended by another"):
            list(frames)
    with pytest.raises(ValueError, match="is closed"):
        clip.video_windows(2)


def test_other_errors_are_told_as_this_process_would(decoder: DecoderProcess, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(30))
    with decoder.open(path, warn=print) as clip:
        with pytest.raises(MediaFormat, match="not an image"):
            clip.image()
        with pytest.raises(ValueError, match="at least 1"):
            clip.video_windows(0)
    with pytest.raises(MediaLimit, match="frames, beyond the limit of 5"):
        decoder.open(path, warn=print, limits=Limits(frames=5))


def test_a_dead_decoder_is_the_files_error_and_the_next_file_has_another(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(240), audio=tone(4.0))
    expected = read(open_clip, path)
    with DecoderProcess() as process:
        clip = process.open(path, warn=print)
        windows = iter(clip.video_windows(2))
        next(windows)
        first = process.pid
        os.kill(first or 0, signal.SIGKILL)
        for stream in (windows, clip.audio_blocks(100), clip.video_windows(2)):
            with pytest.raises(MediaError, match=r"a\.mp4: the decoder crashed on it \(signal 9\)") as met:
                list(stream)
            assert type(met.value) is MediaError
        clip.close()
        assert same(read(process.open, path), expected)
        assert process.pid != first
        os.kill(process.pid or 0, signal.SIGSEGV)  # between two files: nobody's fault
        time.sleep(0.1)
        assert same(read(process.open, path), expected)


def test_a_decoder_that_hangs_is_ended(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(240), audio=tone(4.0))
    with DecoderProcess() as process:
        with process.open(path, warn=print, limits=Limits(stall_s=0.3)) as clip:
            windows = iter(clip.video_windows(2))
            next(windows)
            pid = process.pid or 0
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(MediaLimit, match=r"a\.mp4: the decoder got no further for 0\.3 s"):
                list(windows)
            assert not Path(f"/proc/{pid}").exists()
            with pytest.raises(MediaLimit, match="no further"):  # and not that it has crashed
                list(clip.audio_blocks(100))
        with process.open(path, warn=print) as clip:
            assert clip.n_samples > 0


def test_memory_that_cannot_be_had_is_no_crash_of_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: int) -> int:
        raise OSError(24, "Too many open files")

    path = write_clip(tmp_path / "a.mp4", pictures(8))
    with DecoderProcess() as process, process.open(path, warn=print) as clip:
        pid = process.pid
        monkeypatch.setattr("seats_cli.media.process.new_memory", none)
        with pytest.raises(SeatsError, match=r"no memory to share.*Too many open files"):
            next(clip.video_windows(4))
        monkeypatch.undo()
        assert sum(len(window.frames) for window in clip.video_windows(4)) == len(clip.frame_times_s)
        assert process.pid == pid


def test_whoever_waits_for_a_decoder_can_be_called_off(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(60), fps=2)  # more windows than slots
    over: list[int] = []

    def check() -> None:
        if over:
            raise KeyboardInterrupt

    with DecoderProcess() as process, process.open(path, warn=print, check=check) as clip:
        windows = clip.video_windows(1)
        next(windows)
        os.kill(process.pid or 0, signal.SIGSTOP)
        over.append(1)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(windows)
        with pytest.raises(KeyboardInterrupt):
            process.open(path, warn=print, check=check)
        assert time.monotonic() - began < 10


def test_long_work_that_goes_on_is_no_hang(decoder: DecoderProcess, tmp_path: Path) -> None:
    """Opening decodes all the sound: longer than the limit, but step by step."""
    path = write_clip(tmp_path / "long.ts", None, audio=tone(100.0, channels=1))
    began = time.monotonic()
    with open_clip(path):
        took = time.monotonic() - began
    with decoder.open(path, warn=print, limits=Limits(stall_s=took / 4)) as clip:
        assert clip.n_samples > 99 * 16_000


def shared_memory() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:seats")


def test_no_process_no_memory_and_no_handle_stays_behind(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(60), audio=tone(2.0))
    handles, shared = len(os.listdir("/proc/self/fd")), shared_memory()
    for finished in (True, False):
        with DecoderProcess() as process:
            pid = process.pid
            clip = process.open(path, warn=print)
            windows = iter(clip.video_windows(2))
            window = next(windows)
            assert shared_memory() > shared
            if finished:
                del windows
                clip.close()
        assert not Path(f"/proc/{pid}").exists()
        assert window.frames is not None
        assert window.frames.any()
        del window, clip, process
        with suppress(NameError):
            del windows
    assert shared_memory() == shared
    assert len(os.listdir("/proc/self/fd")) == handles


PARENT = """
import os, signal, sys
from seats_cli.media import DecoderProcess
process = DecoderProcess()
clip = process.open(sys.argv[1], warn=print)
windows = iter(clip.video_windows(2))
next(windows)
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_decoder_whose_parent_is_killed_ends(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(240))
    done = subprocess.run([sys.executable, "-c", PARENT, str(path)], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the decoder is still there")


def test_ctrl_c_is_not_for_the_decoder_and_it_is_light(decoder: DecoderProcess) -> None:
    pid = decoder.pid or 0
    assert os.getpgid(pid) != os.getpgid(0)
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libav" in maps
    assert "torch" not in maps


def test_a_stream_that_fails_gives_its_slot_back() -> None:
    here, there = Pipe()

    def failing(clip: Any, size: int, place: Any) -> Any:
        yield place((size,), np.uint8), None
        place((size,), np.uint8)
        raise MediaError("damaged here")

    desk = SimpleNamespace(clip=object(), here=threading.local())
    streams = worker._Streams(there, desk, failing)  # type: ignore[arg-type]

    def serve() -> None:
        with suppress(EOFError, OSError):
            streams.serve()

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    memory = new_memory(3 * 4096)
    for number in range(5):
        here.send(("begin", 4, None if number else (3, 4096)))
        if not number:
            send_handle(here, memory, os.getpid())
        for expected in ("began", "item", "error"):
            assert here.poll(5), f"no more slots in stream {number}"
            message = here.recv()
            assert message[0] == expected
            if expected == "item":
                here.send(("free", [message[1]]))
    os.close(memory)
    here.close()
    serving.join(5)
    assert not serving.is_alive()
