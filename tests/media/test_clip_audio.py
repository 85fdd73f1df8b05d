"""Samples: those of librosa.load, in exactly the promised number, on the clip's clock."""

import tracemalloc

import av
import librosa
import numpy as np
import pytest
import soundfile

from make_clips import RATE, pictures, tone, write_clip
from seats_cli.errors import MediaRange
from seats_cli.media import Sampling, open_clip
from seats_cli.media import audio as audio_room
from seats_cli.media.probe import probe

TOLERANCE = 1.5e-5


def read(path, per_block=4096, warn=pytest.fail, **sampling):
    with open_clip(path, Sampling(**sampling), warn=warn) as clip:
        blocks = list(clip.audio_blocks(per_block))
        assert all(len(block) == per_block for block in blocks[:-1])
        assert all(block.dtype == np.float32 and block.ndim == 1 for block in blocks)
        samples = np.concatenate([*blocks, np.zeros(0, np.float32)])
        assert len(samples) == clip.n_samples
        return clip, samples


def write_sound(path, samples, rate, subtype=None):
    soundfile.write(path, samples.T, rate, subtype=subtype)
    return path


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_equals_librosa(tmp_path, rate, channels):
    path = write_sound(tmp_path / "a.wav", tone(1.3, rate, channels), rate)
    clip, samples = read(path)
    expected, _ = librosa.load(path, sr=16000, mono=True)
    assert len(samples) == len(expected)
    assert np.abs(samples - expected).max() < TOLERANCE
    assert clip.info.kind == "audio"
    assert (clip.info.audio_rate, clip.info.audio_channels) == (rate, channels)
    assert not clip.info.has_video


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_every_sample_format_of_wav(tmp_path, subtype):
    path = write_sound(tmp_path / "a.wav", tone(0.5, 44100), 44100, subtype)
    expected, _ = librosa.load(path, sr=16000, mono=True)
    assert np.abs(read(path)[1] - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp3", "libmp3lame"), ("a.flac", "flac"), ("a.ogg", "libopus")]
)
def test_compressed_files_equal_librosa(tmp_path, name, codec):
    path = write_clip(tmp_path / name, audio=tone(2.0), audio_codec=codec)
    clip, samples = read(path)
    expected, _ = librosa.load(path, sr=16000, mono=True)
    assert len(samples) == len(expected)
    assert np.abs(samples - expected).max() < TOLERANCE
    assert clip.video_used == "video: none in file"


@pytest.mark.parametrize("channels", [6, 8])
@pytest.mark.parametrize("codec", ["aac", "flac", "pcm_s16le"])
def test_surround_sound(tmp_path, channels, codec):
    """From eight planar channels on, PyAV's own conversion reads wild memory; and every channel counts the
    same.
    """
    original = tone(1.0, channels=channels)
    clip, samples = read(write_clip(tmp_path / "s.mkv", audio=original, audio_codec=codec))
    assert clip.info.audio_channels == channels
    expected = librosa.resample(original.mean(axis=0), orig_sr=RATE, target_sr=16000)
    assert np.median(np.abs(samples[:16000] - expected)) < (0.01 if codec == "aac" else 2**-14)


def test_vorbis(tmp_path):
    path = write_sound(tmp_path / "v.ogg", tone(1.0, 44100), 44100)
    expected, _ = librosa.load(path, sr=16000, mono=True)
    clip, samples = read(path)
    assert clip.info.audio_codec == "vorbis"
    assert np.abs(samples - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "codec"), [("a.m4a", "aac"), ("a.mka", "flac"), ("a.mov", "pcm_s16le"), ("a.mp4", "alac")]
)
def test_what_soundfile_cannot_read(tmp_path, name, codec):
    """Through PyAV; where the codec loses nothing the result is librosa's own resampling of the original."""
    original = tone(2.0)
    clip, samples = read(write_clip(tmp_path / name, audio=original, audio_codec=codec))
    expected = librosa.resample(original.mean(axis=0), orig_sr=RATE, target_sr=16000)
    lossless = codec != "aac"
    assert clip.n_samples == pytest.approx(32000, abs=0 if lossless else 1024)
    error = np.abs(samples[:32000] - expected)
    assert error.max() < 2**-14 if lossless else np.median(error) < 0.01


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_pyav_and_soundfile_agree(tmp_path, codec):
    path = write_clip(tmp_path / "a.wav", audio=tone(0.5), audio_codec=codec)
    file = probe(path, pytest.fail)
    track = file.audio
    plain = audio_room._scan_source(audio_room.Source(file, track, 0.0, None, True), pytest.fail)
    decoded = audio_room._scan_source(audio_room.Source(file, track, 0.0, None, False), pytest.fail)
    assert plain.samples == decoded.samples == 8000
    assert np.abs(plain.waveform - decoded.waveform).max() < 1e-6


@pytest.mark.parametrize(
    "name", ["plain.mp4", "bframes.mkv", "stream.ts", "web.webm", "old.avi", "late_start.mkv"]
)
def test_video_soundtracks_equal_a_plain_decode(clip_file, name):
    path = clip_file(name).path
    clip, samples = read(path)
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        video = next(av.open(str(path)).decode(video=0))
    mono = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in frames])
    shift = round((frames[0].time - video.time) * frames[0].sample_rate)
    mono = np.concatenate([np.zeros(max(shift, 0), np.float32), mono[max(-shift, 0) :]])
    expected = librosa.resample(mono.astype(np.float32), orig_sr=frames[0].sample_rate, target_sr=16000)
    assert len(samples) == len(expected)
    assert np.abs(samples - expected).max() < TOLERANCE
    assert clip.audio_used.startswith(f"audio: {clip.info.audio_codec} {frames[0].sample_rate} Hz")


@pytest.mark.parametrize("name", ["plain.mp4", "bframes.mkv", "stream.ts"])
@pytest.mark.parametrize(("start_s", "end_s"), [(1.0, 2.5), (None, 1.25), (3.0, None)])
def test_a_range_is_a_cut_of_the_whole(clip_file, name, start_s, end_s):
    path = clip_file(name).path
    _, whole = read(path)
    clip, part = read(path, start_s=start_s, end_s=end_s)
    assert clip.info.has_audio
    first, last = round((start_s or 0) * 16000), None if end_s is None else round(end_s * 16000)
    expected = whole[first:last]
    rounding = 8 if name.endswith("mkv") else 1  # mkv's clock ticks in milliseconds, 16 samples
    assert abs(len(part) - len(expected)) <= rounding
    inner = slice(
        200, min(len(part), len(expected)) - 200
    )  # the resampler has less context at the cut's edges
    errors = [np.abs(np.roll(part, k)[inner] - expected[inner]).max() for k in range(-rounding, rounding + 1)]
    assert min(errors) < (0.06 if name.endswith("mkv") else 2e-3)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.m4a"])
def test_ranges_of_audio_files(tmp_path, name):
    codec = {"a.wav": "pcm_s16le", "a.mp3": "libmp3lame", "a.m4a": "aac"}[name]
    path = write_clip(tmp_path / name, audio=tone(4.0), audio_codec=codec)
    _, whole = read(path)
    clip, part = read(path, start_s=2.0, end_s=3.0)
    assert clip.n_samples == 16000
    assert clip.info.duration_s == pytest.approx(1.0)
    assert np.abs(part[200:-200] - whole[32200:47800]).max() < 2e-3
    with pytest.raises(MediaRange, match=r"nothing in the range 9 s to the end; the clip lasts 4\.0 s"):
        open_clip(path, Sampling(start_s=9.0), warn=pytest.fail)


@pytest.mark.parametrize("per_block", [1000, 16000, 10**7])
def test_any_block_size_gives_the_same_samples(clip_file, per_block):
    path = clip_file("plain.mp4").path
    assert np.array_equal(read(path, per_block)[1], read(path, 777)[1])


@pytest.mark.parametrize("name", ["plain.mp4", "stream.ts"])
def test_a_long_file_decodes_again_to_the_same(clip_file, monkeypatch, name):
    path = clip_file(name).path
    _, kept = read(path)
    monkeypatch.setattr(audio_room, "CACHE_SECONDS", 1)
    with open_clip(path, warn=pytest.fail) as clip:
        assert clip._audio.waveform is None
        for _ in range(2):
            blocks = list(clip.audio_blocks(3000))
            assert {len(block) for block in blocks[:-1]} == {3000}
            assert np.array_equal(np.concatenate(blocks), kept)


def test_long_audio_streams_on_bounded_memory(tmp_path, monkeypatch):
    """Ten times the audio must not take more memory, in the scan or in the blocks."""
    monkeypatch.setattr(audio_room, "CACHE_SECONDS", 1)
    peaks = []
    for seconds in (20, 200):
        path = tmp_path / f"{seconds}.wav"
        with soundfile.SoundFile(path, "w", 16000, 1) as sound:
            for _ in range(seconds):
                sound.write(np.zeros(16000, np.float32))
        read(path)  # imports and caches
        tracemalloc.start()
        with open_clip(path, warn=pytest.fail) as clip:
            assert sum(len(block) for block in clip.audio_blocks(16000)) == seconds * 16000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 200 * 16000 * 4 / 4


def test_nan_and_infinity_become_silence(tmp_path, lines):
    samples = tone(1.0, 16000, 1)
    clean = samples.copy()
    samples[0, 100], samples[0, 5000:5003] = np.nan, np.inf
    clean[0, 100], clean[0, 5000:5003] = 0, 0
    _, read_back = read(write_sound(tmp_path / "n.wav", samples, 16000, "FLOAT"), warn=lines.append)
    assert np.array_equal(read_back, clean[0])
    assert len(lines) == 1
    assert "NaN" in lines[0]


@pytest.mark.parametrize("cut", [{}, {"start_s": 0.71}, {"start_s": 0.3, "end_s": 1.77}], ids=str)
@pytest.mark.parametrize("codec", ["aac", "libopus", "ac3"])
def test_frames_that_are_loaded_together_are_those_loaded_one_by_one(tmp_path, monkeypatch, codec, cut):
    path = write_clip(tmp_path / "c.mkv", pictures(30, 32, 32), audio=tone(2.6, 48000, 2), audio_codec=codec)
    monkeypatch.setattr(audio_room, "_BLOCK", 5000)
    together = read(path, warn=lambda _: None, **cut)[1]
    joined, whole = [], audio_room._frames_mono
    monkeypatch.setattr(audio_room, "_frames_mono", lambda frames: joined.append(frames) or whole(frames))
    assert np.array_equal(read(path, warn=lambda _: None, **cut)[1], together)
    assert 4 <= max(map(len, joined)) <= 6  # of 1536 to 960 samples
    monkeypatch.setattr(audio_room, "_joins", lambda run, frame: False)
    joined.clear()
    one_by_one = read(path, warn=lambda _: None, **cut)[1]
    assert not joined
    assert len(one_by_one) == len(together)
    assert np.abs(one_by_one - together).max() < 1e-6


def test_frames_of_other_channels_are_not_loaded_together():
    stereo, mono = (
        av.AudioFrame.from_ndarray(tone(0.01, 48000, n), "fltp", name)
        for n, name in ((2, "stereo"), (1, "mono"))
    )
    assert audio_room._joins([], mono)
    assert audio_room._joins([mono], mono)
    assert not audio_room._joins([stereo], mono)
    assert not audio_room._joins([], av.AudioFrame("s16p", "mono", 480))


def test_gaps_inside_the_track_are_silence(tmp_path, lines):
    """A damaged stretch: what follows keeps its time."""
    path = write_clip(tmp_path / "g.mp4", pictures(180), audio=tone(6.0))
    _, whole = read(path)
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size) for p in container.demux(audio=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in spans[90:150]:
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    _, samples = read(path, warn=lines.append)
    assert len(samples) == len(whole)
    for same in (slice(28_000), slice(60_000, 90_000)):
        assert np.abs(samples[same] - whole[same]).max() < 0.01
    assert any("damaged audio packets skipped" in line for line in lines)
    assert any("missing inside the audio track" in line for line in lines)


def test_audio_before_the_first_frame_is_cut_and_said(tmp_path, lines):
    path = write_clip(tmp_path / "e.mkv", pictures(60), start_s=2.0, audio=tone(4.0))
    clip, samples = read(path, warn=lines.append)
    assert clip.n_samples == pytest.approx(32000, abs=600)
    expected = librosa.resample(tone(4.0).mean(axis=0), orig_sr=RATE, target_sr=16000)[32000:]
    assert np.abs(samples[300:31000] - expected[300:31000]).max() < 0.05
    assert lines == ["e.mkv: 2.0 s of audio before the first video frame are not heard"]


def test_silent_video_and_late_audio(clip_file, tmp_path):
    with open_clip(clip_file("open_gop.mkv").path, warn=pytest.fail) as clip:
        assert clip.n_samples == 0
        assert clip.audio_used == "audio: none in file"
        assert list(clip.audio_blocks(100)) == []
    late = write_clip(tmp_path / "late.mkv", pictures(150), audio=tone(1.0), audio_start_s=3.0)
    with open_clip(late, Sampling(end_s=2.0), warn=pytest.fail) as clip:
        assert not np.concatenate(list(clip.audio_blocks(1000))).any()


def test_several_tracks_name_the_one_heard(tmp_path):
    quiet, loud = np.zeros((1, RATE), np.float32), tone(1.0, RATE, 2)
    path = write_clip(tmp_path / "two.mkv", pictures(30), audio=[loud, quiet], languages=["eng", "fra"])
    clip, samples = read(path)
    assert "track 1 of 2 (eng)" in clip.audio_used
    assert np.abs(samples).max() > 0.1


def test_an_audio_file_without_samples(tmp_path):
    path = write_sound(tmp_path / "none.wav", np.zeros((1, 0), np.float32), 16000)
    with pytest.raises(Exception, match=r"none\.wav") as error:
        open_clip(path, warn=pytest.fail)
    assert error.value.kind.startswith("media")
