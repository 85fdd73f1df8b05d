"""Decoding on a GPU: what it may decode, and that no frame depends on it.

The GPU here is played by the CPU, whose frames are handed over as a GPU's are (interleaved chroma);
tests/test_gpu_nvdec.py has the real one.
"""

import ctypes
import os

import av
import numpy as np
import pytest

from conftest import SPECS
from make_clips import pictures, tone, write_clip
from seats_cli.errors import UsageError
from seats_cli.media import Limits, Sampling, VideoDecoding, choose_decoding, open_clip, worker
from seats_cli.media import nvdec as nvdec_module
from seats_cli.media import video as video_module
from seats_cli.media.container import decode, open_container
from seats_cli.media.nvdec import DOWNLOADED, acceleration, why_not

GPU = VideoDecoding(0, "asked for", insisted=True)
NO_SUCH_GPU = VideoDecoding(99, "asked for", insisted=True)
ON_GPU = [name for name in SPECS if name != "old.avi"]  # MPEG-4 is not decoded there


class PlayedGpu:
    """The containers that a GPU decodes, and what it does to each frame; `at` counts frames."""

    def __init__(self):
        self.containers, self.at = [], 0

    def open(self, reader):
        if reader.gpu is None:
            return None
        self.containers.append(open_container(reader.file.path, reader.file.guard, only=reader.track.index))
        return self.containers[-1]

    def decode(self, packet, guard):
        frames = decode(packet, guard)
        if frames is None or not any(packet.stream.container is one for one in self.containers):
            return frames
        self.at += len(frames)
        return [self.download(frame) for frame in frames]

    def download(self, frame):
        return frame.reformat(format=DOWNLOADED[frame.format.name])


@pytest.fixture
def gpu(monkeypatch):
    played = PlayedGpu()
    monkeypatch.setattr(video_module.FrameReader, "_open_on_gpu", lambda reader: played.open(reader))
    monkeypatch.setattr(video_module, "decode", played.decode)
    return played


def read(path, decoding, warn=pytest.fail, **sampling):
    """The clip after it was read, and its frames (T,H,W,3)."""
    with open_clip(path, Sampling(**sampling), warn=warn, decoding=decoding) as clip:
        return clip, np.concatenate([window.frames for window in clip.video_windows(4)])


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("sampling", [{"max_frames": 4}, {}, {"start_s": 0.9}], ids=str)
def test_frames_are_the_cpus(clip_file, gpu, name, sampling):
    """With seeks, without, and from inside the file; turned, without timestamps, with open groups."""
    path, _ = clip_file(name)
    expected_clip, expected = read(path, VideoDecoding(), **sampling)
    clip, frames = read(path, GPU, **sampling)
    assert np.array_equal(frames, expected)
    assert (expected_clip.video_decoder, clip.video_decoder) == ("cpu", "nvdec")
    assert clip.decoder_used == "video decoded on GPU 0: asked for"
    assert gpu.at > 0


@pytest.mark.parametrize("pixel_format", DOWNLOADED)
def test_every_pixel_format_comes_back_without_loss(tmp_path, gpu, pixel_format):
    path = write_clip(tmp_path / "c.mp4", pictures(20), pixel_format=pixel_format)
    _, expected = read(path, VideoDecoding())
    clip, frames = read(path, GPU)
    assert np.array_equal(frames, expected)
    assert clip.video_decoder == "nvdec"


class OnGpu:
    """A frame whose pixels are in the GPU's memory until it is converted."""

    class format:
        name = "cuda"

    def __init__(self, frame, hand_over):
        self._frame, self._hand_over = frame, hand_over

    def __getattr__(self, name):
        return getattr(self._frame, name)

    def reformat(self, **asked):
        return self._hand_over(self._frame).reformat(**asked)


@pytest.mark.parametrize("copies", [99, 2, 0])
def test_frames_stay_on_the_gpu_until_they_are_looked_at(clip_file, gpu, lines, copies):
    def hand_over(frame):
        handed.append(frame.pts)
        if len(handed) > copies:
            raise av.error.ExternalError(1, "copying failed")
        return download(frame)

    handed, download = [], gpu.download
    gpu.download = lambda frame: OnGpu(frame, hand_over)
    path, _ = clip_file("bframes.mp4")
    expected = read(path, VideoDecoding(), max_frames=6)[1]
    clip, frames = read(path, GPU, lines.append, max_frames=6)
    assert np.array_equal(frames, expected)
    assert len(handed) == min(copies + 1, 6)
    assert gpu.at > len(handed) or not copies  # frames were decoded that nobody looked at
    assert clip.video_decoder == {99: "nvdec", 2: "nvdec+cpu", 0: "cpu"}[copies]
    assert any("does not hand a frame over: copying failed" in line for line in lines) == (copies < 6)


def test_variable_rate_and_a_change_of_size(tmp_path, gpu):
    held = write_clip(tmp_path / "v.mkv", pictures(40), times_s=[i / 10 + (i > 20) for i in range(40)])
    small = write_clip(tmp_path / "a.ts", pictures(30, 64, 48), gop=10)
    large = write_clip(tmp_path / "b.ts", pictures(30, 96, 64), gop=10, start_s=1.0)
    (tmp_path / "joined.ts").write_bytes(small.read_bytes() + large.read_bytes())
    for path in (held, tmp_path / "joined.ts"):
        _, expected = read(path, VideoDecoding())
        clip, frames = read(path, GPU)
        assert np.array_equal(frames, expected)
        assert clip.video_decoder == "nvdec"


def test_a_fallback_inside_ffmpeg_is_told(clip_file, gpu, lines):
    """FFmpeg then gives the CPU's frames without a word."""
    path, _ = clip_file("bframes.mp4")
    gpu.download = lambda frame: frame
    clip, frames = read(path, GPU, lines.append)
    assert np.array_equal(frames, read(path, VideoDecoding())[1])
    assert lines == ["bframes.mp4: video decoded on the CPU: FFmpeg leaves this h264 to the CPU"]
    assert clip.video_decoder == "cpu"
    silent, _ = read(path, VideoDecoding(0, "the model is there"))
    assert silent.decoder_used == "video decoded on the CPU: FFmpeg leaves this h264 to the CPU"


@pytest.mark.parametrize("sampling", [{}, {"max_frames": 6}], ids=str)
def test_the_cpu_takes_over_midway(clip_file, gpu, lines, sampling):
    path, _ = clip_file("bframes.mkv")
    download = gpu.download
    gpu.download = lambda frame: download(frame) if gpu.at < 30 else frame
    clip, frames = read(path, GPU, lines.append, **sampling)
    assert np.array_equal(frames, read(path, VideoDecoding(), **sampling)[1])
    assert clip.video_decoder == "nvdec+cpu"
    assert len(lines) == 1
    assert "on the CPU, after a part on the GPU: FFmpeg leaves" in lines[0]


def test_a_first_frame_that_differs_is_refused(clip_file, gpu, lines):
    path, _ = clip_file("plain.mp4")

    def shifted(frame):
        planes = frame.to_ndarray(format="yuv420p")
        moved = av.VideoFrame.from_ndarray(np.roll(planes, 8, axis=1), format="yuv420p")
        moved.pts, moved.time_base = frame.pts, frame.time_base
        return moved.reformat(format="nv12")

    gpu.download = shifted
    clip, frames = read(path, GPU, lines.append)
    assert np.array_equal(frames, read(path, VideoDecoding())[1])
    assert clip.video_decoder == "cpu"
    assert "the GPU's frame differs from the CPU's by up to " in lines[0]


def test_frames_that_the_gpu_drops_come_from_the_cpu(clip_file, gpu, lines, monkeypatch):
    path, _ = clip_file("plain.mp4")

    def until_40(packet, guard):
        on_gpu = any(packet.stream.container is one for one in gpu.containers)
        return gpu.decode(packet, guard)[:0] if on_gpu and gpu.at >= 40 else gpu.decode(packet, guard)

    monkeypatch.setattr(video_module, "decode", until_40)
    clip, frames = read(path, GPU, lines.append)
    assert np.array_equal(frames, read(path, VideoDecoding())[1])
    assert clip.frames_replaced == 0
    assert "the GPU gives no frame at " in lines[0]


def blank(path, first, last):
    """Zeros in place of the packets `first` to `last` of the video track."""
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in spans[first:last]:
        data[position : position + size] = b"\x00" * size
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["middle", "tail", "cut"])
def test_damaged_files_read_as_on_the_cpu(tmp_path, gpu, damage):
    path = write_clip(tmp_path / "d.mp4", pictures(300), gop=30, container_options={"movflags": "faststart"})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        blank(path, *((100, 130) if damage == "middle" else (150, None)))
    expected_lines, lines = [], []
    expected_clip, expected = read(path, VideoDecoding(), expected_lines.append)
    clip, frames = read(path, GPU, lines.append)
    assert np.array_equal(frames, expected)
    assert clip.frames_replaced == expected_clip.frames_replaced
    assert [line for line in lines if "on the CPU" not in line] == expected_lines != []
    assert clip.video_decoder == ("nvdec" if lines == expected_lines else "nvdec+cpu")


def test_a_device_that_does_not_open(clip_file, lines):
    """Nothing is played here: there is no such GPU, on any machine."""
    path, _ = clip_file("plain.mp4")
    clip, frames = read(path, NO_SUCH_GPU, lines.append)
    assert np.array_equal(frames, read(path, VideoDecoding())[1])
    assert clip.video_decoder == "cpu"
    assert len(lines) == 1
    assert lines[0].startswith("plain.mp4: video decoded on the CPU: the GPU's decoder does not open: ")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("c.avi", {"codec": "mpeg4"}, "the GPU decodes h264, hevc, vp8, vp9, not mpeg4"),
        ("c.mp4", {"pixel_format": "yuv422p"}, "the GPU does not give yuv422p without loss"),
        ("c.mkv", {"pixel_format": "yuv444p"}, "the GPU does not give yuv444p without loss"),
    ],
)
def test_what_no_gpu_decodes_is_not_tried(tmp_path, lines, monkeypatch, name, options, reason):
    path = write_clip(tmp_path / name, pictures(12), **options)
    expected = read(path, VideoDecoding())[1]
    monkeypatch.setattr(video_module, "acceleration", lambda gpu: pytest.fail("it was tried"))
    clip, frames = read(path, GPU, lines.append)
    assert np.array_equal(frames, expected)
    assert lines == [f"{name}: video decoded on the CPU: {reason}"]
    assert clip.video_decoder == "cpu"


def test_a_codec_that_ffmpeg_has_no_gpu_decoder_for(tmp_path, lines, monkeypatch):
    """AV1 by dav1d: PyAV opens the file and leaves out the acceleration, without a word."""
    path = write_clip(tmp_path / "c.mkv", pictures(12), codec="libsvtav1")
    monkeypatch.setattr(nvdec_module, "CODECS", ("av1",))
    clip, _ = read(path, GPU, lines.append)
    assert clip.video_decoder == "cpu"
    assert lines == ["c.mkv: video decoded on the CPU: FFmpeg has no GPU decoder of av1"]


def test_sound_has_no_video_decoder(clip_file, tmp_path):
    path = write_clip(tmp_path / "s.wav", audio=np.zeros((1, 48000), np.float32), audio_codec="pcm_s16le")
    with open_clip(path, warn=pytest.fail, decoding=NO_SUCH_GPU) as clip:
        assert list(clip.video_windows(2)) == []
        assert (clip.video_decoder, clip.decoder_used) == ("", "")


# --- the choice -------------------------------------------------------------------------------------------
def test_the_choice(monkeypatch):
    asked = []
    monkeypatch.setattr(nvdec_module, "why_not", asked.append)
    assert choose_decoding("none", 1).gpu is None
    assert choose_decoding("auto", None) == VideoDecoding(None, "the model is on no NVIDIA GPU")
    assert asked == []
    assert choose_decoding("auto", 1) == VideoDecoding(1, "the model is there", insisted=False)
    assert choose_decoding("cuda", 1) == VideoDecoding(1, "asked for", insisted=True)
    assert choose_decoding("cuda", None) == VideoDecoding(0, "asked for", insisted=True)
    assert asked == [1, 1, 0]
    monkeypatch.setattr(nvdec_module, "why_not", lambda gpu: "it is broken")
    assert choose_decoding("cuda", 1) == VideoDecoding(None, "it is broken")


def test_a_choice_that_does_not_exist():
    with pytest.raises(UsageError, match="'vaapi'") as error:
        choose_decoding("vaapi", None)
    assert error.value.hint == "accepted: none, auto, cuda"


def test_the_acceleration_is_that_gpus_and_may_fall_back(monkeypatch):
    monkeypatch.setattr(nvdec_module, "_MAY_STAY", True)
    monkeypatch.setattr(nvdec_module, "HWAccel", lambda *words, **named: (words, named))
    assert acceleration(3) == (
        ("cuda",),
        {
            "device": "3",
            "allow_software_fallback": True,
            "is_hw_owned": True,
            "options": {"primary_ctx": "0"},
        },
    )


@pytest.fixture
def contexts(monkeypatch):
    """The options with which contexts were made, by an FFmpeg that refuses those in `refused`."""

    class Accelerated:
        def __init__(self, *_, options, **named):
            self.options = options

        def create(self, codec):
            made.append(self.options)
            if self.options in refused:
                raise av.error.PermissionError(1, "no driver")
            return self

    made, refused = [], []
    monkeypatch.setattr(nvdec_module, "_MAY_STAY", True)
    monkeypatch.setattr(nvdec_module, "_held", {})
    monkeypatch.setattr(nvdec_module, "HWAccel", Accelerated)
    return made, refused


def test_a_context_that_is_held_serves_every_file(contexts):
    for _ in range(2):
        nvdec_module.hold(1)
    assert contexts[0] == [{"primary_ctx": "1"}]
    assert acceleration(1).options == {"primary_ctx": "1"}
    assert acceleration(0).options == {"primary_ctx": "0"}


def test_a_context_that_cannot_be_held_is_each_file_s(contexts):
    made, refused = contexts
    refused.append({"primary_ctx": "1"})
    for _ in range(2):
        nvdec_module.hold(0)
    assert made == refused  # and once is enough to know
    assert acceleration(0).options == {"primary_ctx": "0"}


@pytest.mark.skipif(os.name != "posix", reason="there are no decoder processes")
def test_a_context_is_held_for_files_with_video(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(worker.nvdec, "hold", held.append)
    write_clip(tmp_path / "v.mp4", pictures(8))
    write_clip(tmp_path / "s.m4a", None, audio=tone(1.0))
    desk = worker._Desk(None, lambda: None)
    desk.here.warn = pytest.fail
    for name, gpu in (("s.m4a", 1), ("v.mp4", None), ("v.mp4", 1)):
        answer = desk._open(None, str(tmp_path / name), Sampling(), VideoDecoding(gpu), Limits())
        assert answer[0] == "opened"
    assert held == [1]
    desk._close()


def test_why_a_gpu_cannot():
    assert isinstance(why_not(99), str)


class Opening:
    """A device that opens, or fails to as told."""

    def __init__(self, error=None):
        self.error = error

    def create(self, codec):
        assert codec.name == "h264"
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotImplementedError("no config"), "PyAV's FFmpeg is built without CUDA"),
        (av.error.PermissionError(1, "Operation not permitted"), "there is no NVIDIA driver"),
        (
            av.error.ExternalError(542398533, "Generic error"),
            "CUDA device 2 does not open (Generic error): it may be absent, hidden or full",
        ),
    ],
)
def test_why_a_device_does_not_open(monkeypatch, error, words):
    monkeypatch.setattr(nvdec_module, "acceleration", lambda gpu: Opening(error))
    assert why_not(2) == words


def test_a_driver_without_its_video_library(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(nvdec_module, "acceleration", lambda gpu: Opening())
    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert "NVIDIA_DRIVER_CAPABILITIES" in why_not(0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    assert why_not(0) is None
