"""What a path may be: each kind of media told apart, and an error that helps for everything else."""

import os
import shutil
import socket
import subprocess
import sys

import av
import numpy as np
import pytest

from make_clips import add_exif_orientation, pictures, tone, write_clip, write_picture
from seats_cli.errors import (
    MediaEncrypted,
    MediaError,
    MediaFormat,
    MediaMissing,
    MediaTruncated,
)
from seats_cli.media import Sampling, open_clip


def refused(path, kind, *words):
    with pytest.raises(MediaError) as error:
        open_clip(path, warn=pytest.fail)
    assert type(error.value) is kind, error.value.message
    assert str(path) in error.value.message
    assert error.value.hint
    for word in words:
        assert word in error.value.message
    return error.value


@pytest.mark.parametrize(
    "address", ["http://example.org/a.mp4", "rtsp://x/y", "file:///tmp/a.mp4", "concat://a|b"]
)
def test_addresses_are_refused(address):
    refused(address, MediaMissing, "only local files")


@pytest.mark.parametrize("path", ["/nowhere/a.mp4", "pipe:0", "concat:a|b", "x" * 5000, "nul\0l", ""])
def test_missing_files(path):
    refused(path, MediaMissing)


def test_what_is_not_a_file(tmp_path):
    refused(tmp_path, MediaMissing, "folder")
    fifo = tmp_path / "fifo.mp4"
    os.mkfifo(fifo)
    refused(fifo, MediaMissing, "not a regular file")
    refused("/dev/zero", MediaMissing, "not a regular file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        refused(tmp_path / "s", MediaMissing, "not a regular file")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    refused(empty, MediaMissing, "0 bytes")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write_clip(tmp_path / "a.mp4", pictures(8))
    path.chmod(0)
    refused(path, MediaMissing, "permission denied")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("noise.mp4", np.random.default_rng(0).bytes(5000)),
        ("text.txt", b"hello world\n" * 100),
        ("text.mp4", b"hello world\n" * 100),
        ("page.mp4", b"<!doctype html><html><body>404 Not Found</body></html>"),
        ("words.srt", b"1\n00:00:00,000 --> 00:00:02,000\nhi\n\n"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile 'a.mp4'\n"),
        ("program.py", b"import os\nprint(os.sep)\n"),
    ],
)
def test_what_is_not_media(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert "mp4" in (refused(path, MediaFormat).hint or "")


def test_zeros_are_an_unfinished_download(tmp_path):
    path = tmp_path / "zeros.mp4"
    path.write_bytes(bytes(100_000))
    refused(path, MediaTruncated, "zeros")


def test_an_mp4_without_its_index(tmp_path):
    path = write_clip(tmp_path / "cut.mp4", pictures(90))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, MediaTruncated, "moov")


@pytest.mark.parametrize("audio", [None, 1.0])
def test_an_encrypted_mp4(tmp_path, audio):
    options = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
        "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
    }
    sound = tone(audio) if audio else None
    refused(
        write_clip(tmp_path / "e.mp4", pictures(30), audio=sound, container_options=options), MediaEncrypted
    )


@pytest.mark.parametrize(
    ("name", "options"), [("t.mp4", {"movflags": "faststart"}), ("t.mkv", {}), ("t.avi", {})]
)
def test_a_truncated_file_answers_from_what_is_there(tmp_path, name, options, lines):
    path = write_clip(
        tmp_path / name, pictures(300), gop=30, audio=tone(10.0), audio_codec="ac3", container_options=options
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_clip(path, warn=lines.append) as clip:
        frames = np.concatenate([window.frames for window in clip.video_windows(4)])
        samples = np.concatenate(list(clip.audio_blocks(16000)))
        assert len(frames) == len(clip.frame_times_s)
        assert len(samples) == clip.n_samples
        assert 3 < clip.info.duration_s < 8
        assert 0.3 < clip.readable_fraction < 0.8
        assert clip.frame_times_s[-1] < clip.info.duration_s
    assert any("only the first " in line and " of 10.0 s can be read" in line for line in lines)


@pytest.mark.parametrize("name", ["t.wav", "t.flac"])
def test_truncated_audio_files(tmp_path, name, lines):
    codec = "flac" if name == "t.flac" else "pcm_s16le"
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.5, 0.5, (1, 48_000 * 6)).astype(np.float32)
    path = write_clip(tmp_path / name, audio=noise, audio_codec=codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_clip(path, warn=lines.append) as clip:
        assert 2.5 < clip.n_samples / 16000 < 3.5
        assert sum(map(len, clip.audio_blocks(1000))) == clip.n_samples
        assert clip.readable_fraction == pytest.approx(0.5, abs=0.1)
    assert any("of 6.0 s can be read" in line for line in lines)


def test_a_range_before_the_cut_is_not_truncated(tmp_path):
    path = write_clip(tmp_path / "t.mkv", pictures(300), gop=30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_clip(path, Sampling(start_s=1.0, end_s=3.0), warn=pytest.fail) as clip:
        assert clip.readable_fraction == 1.0


@pytest.mark.parametrize(
    ("name", "codec", "size"), [("cover.mp3", "libmp3lame", 1152), ("cover.m4a", "aac", 1024)]
)
def test_cover_art_is_not_video(tmp_path, name, codec, size):
    picture = write_picture(tmp_path / "c.jpg", pictures(1)[0], "mjpeg", "yuvj420p")
    path = tmp_path / name
    form = "mp3" if name.endswith("mp3") else "mp4"  # PyAV's table for .m4a knows no pictures, the muxer does
    with av.open(str(picture)) as source, av.open(str(path), "w", format=form) as container:
        sound = container.add_stream(codec, rate=48000, layout="stereo")
        cover = container.add_stream_from_template(source.streams.video[0])
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(tone(1.0), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        fit = av.AudioResampler(
            format=sound.codec_context.format, layout="stereo", rate=48000, frame_size=size
        )
        packet = next(p for p in source.demux() if p.size)
        packet.stream = cover
        container.mux(packet)
        for fitted in fit.resample(frame):
            container.mux(sound.encode(fitted))
        container.mux(sound.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with open_clip(path, warn=pytest.fail) as clip:
        assert clip.info.kind == "audio"
        assert clip.video_used == "video: none in file"
        assert clip.n_samples > 14000


PICTURE = pictures(1, 40, 24)[0]


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "tolerance"),
    [
        ("a.png", "png", "rgb24", 0),
        ("a.bmp", "bmp", "bgr24", 0),
        ("a.jpg", "mjpeg", "yuvj444p", 40),
        ("a.webp", "libwebp", "bgra", 40),
        ("a.gif", "gif", "rgb8", 60),
    ],
)
def test_images(tmp_path, name, codec, pixel_format, tolerance):
    path = write_picture(tmp_path / name, PICTURE, codec, pixel_format)
    with open_clip(path, warn=pytest.fail) as clip:
        assert clip.info.kind == "image"
        assert (clip.info.width, clip.info.height) == (40, 24)
        assert (clip.n_samples, len(clip.frame_times_s)) == (0, 0)
        assert list(clip.video_windows(2)) == []
        image = clip.image()
    assert image.dtype == np.uint8
    assert image.shape == PICTURE.shape
    assert np.abs(image.astype(int) - PICTURE).mean() <= tolerance / 8
    assert np.abs(image[4, 4].astype(int) - PICTURE[4, 4]).max() <= tolerance


def test_an_animation_says_that_its_first_picture_is_used(tmp_path):
    path, warnings = tmp_path / "a.gif", []
    with av.open(str(path), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 40, 24, "rgb8"
        for picture in pictures(3, 40, 24):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="rgb8")))
        container.mux(stream.encode())
    with open_clip(path, warn=warnings.append) as clip:
        assert clip.image().shape == (24, 40, 3)
    assert warnings == ["a.gif: is an animation; only its first picture is looked at"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """Undo what the camera did: the stored picture is made from the upright one by the tag's inverse."""
    upright = PICTURE
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    path = write_picture(tmp_path / "e.jpg", np.ascontiguousarray(stored), "mjpeg", "yuvj444p")
    path.write_bytes(add_exif_orientation(path.read_bytes(), orientation))
    with open_clip(path, warn=pytest.fail) as clip:
        image = clip.image()
        assert (clip.info.width, clip.info.height) == (40, 24)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 12


def test_transparency_lies_over_white(tmp_path):
    rgba = np.zeros((24, 40, 4), np.uint8)
    rgba[:, 20:] = (200, 0, 0, 255)
    rgba[:12, :20, 3] = 128
    path = write_picture(tmp_path / "t.png", rgba, "png", "rgba")
    with open_clip(path, warn=pytest.fail) as clip:
        image = clip.image()
    assert image[20, 5].tolist() == [255, 255, 255]
    assert image[5, 5].tolist() == [127, 127, 127]
    assert image[5, 30].tolist() == [200, 0, 0]


def test_a_video_is_not_an_image(clip_file, lines, tmp_path):
    with (
        open_clip(clip_file("plain.mp4").path, warn=pytest.fail) as clip,
        pytest.raises(MediaFormat, match="not an image"),
    ):
        clip.image()
    picture = write_picture(tmp_path / "a.png", PICTURE, "png", "rgb24")
    open_clip(picture, Sampling(start_s=1.0), warn=lines.append)
    assert lines == ["a.png: is an image; the range is ignored"]


@pytest.mark.parametrize("name", ["a b#?%d:é名.mp4", "-x.mp4", os.fsdecode(b"\xff\xfe.mp4"), "noextension"])
def test_odd_names(clip_file, tmp_path, monkeypatch, name):
    shutil.copy(clip_file("plain.mp4").path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with open_clip(name, warn=pytest.fail) as clip:
        assert clip.info.has_video
        assert next(clip.video_windows(2)).frames.shape == (2, 48, 64, 3)


def test_a_picture_with_a_number_pattern_for_a_name(tmp_path):
    plain = write_picture(tmp_path / "a.png", PICTURE, "png", "rgb24")
    odd = tmp_path / "b%03d.png"
    plain.rename(odd)
    with open_clip(odd, warn=pytest.fail) as clip:
        assert np.array_equal(clip.image(), PICTURE)


def test_words_for_people(clip_file):
    with open_clip(clip_file("plain.mp4").path, warn=pytest.fail) as clip:
        assert clip.video_used == "video: h264 64x48 at 30 fps, 10 of 150 frames"
        assert clip.audio_used == "audio: aac 48000 Hz stereo, 5.0 s"
        assert clip.info.size_bytes == clip_file("plain.mp4").path.stat().st_size


def test_importing_the_room_is_light():
    heavy = ("torch", "librosa", "soundfile", "soxr")
    code = f"import sys, seats_cli.media; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
