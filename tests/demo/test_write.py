"""A written clip is a real file that decodes to what was rendered, with its truth beside it."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from seats_cli.demo.questions import FAMILIES
from seats_cli.demo.world import sample_clip
from seats_cli.demo.write import FPS, SIZE, render_clip, render_waveform, write_clip
from seats_cli.errors import MediaError, UsageError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, 7, 8.0)
    return path


def test_file_is_h264_and_aac_of_the_right_length(clip: Path) -> None:
    with av.open(str(clip)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height, video.frames) == (SIZE, SIZE, 8 * FPS)
        assert container.duration / 1e6 == pytest.approx(8.0, abs=0.1)
    assert 20_000 < clip.stat().st_size < 400_000


def test_pixels_and_sound_survive_the_codecs(clip: Path) -> None:
    spec = sample_clip(7, 8.0, "test")
    with av.open(str(clip)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    numbers = range(0, 8 * FPS, 8)
    error = np.square(frames[::8].astype(float) - render_clip(spec, numbers)).mean()
    assert 10 * np.log10(255**2 / error) > 33
    with av.open(str(clip)) as container:
        wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    truth = render_waveform(spec)
    assert len(truth) == 8 * 16000
    assert np.corrcoef(wave[: len(truth)], truth)[0, 1] > 0.95


def test_truth_beside_the_file(clip: Path) -> None:
    document = json.loads(clip.with_suffix(".json").read_text())
    assert (document["seed"], document["duration_s"], document["split"]) == (7, 8.0, "test")
    assert document["scene"] == json.loads(json.dumps(sample_clip(7, 8.0, "test").to_json()))
    assert {row["family"] for row in document["questions"]} == set(FAMILIES)
    for row in document["questions"]:
        assert {"family", "question", "answer"} <= row.keys()
        assert "options" not in row or row["answer"] in list("abcd")


def test_the_same_seed_gives_the_same_file(clip: Path, tmp_path: Path) -> None:
    seconds: list[float] = []
    write_clip(tmp_path / "again.mp4", 7, 8.0, on_progress=seconds.append)
    assert (tmp_path / "again.mp4").read_bytes() == clip.read_bytes()
    assert seconds == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_a_last_half_second_is_written(tmp_path: Path) -> None:
    write_clip(tmp_path / "odd.mp4", 1, 8.5, size=64, fps=4)
    with av.open(str(tmp_path / "odd.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 34
    with av.open(str(tmp_path / "odd.mp4")) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert samples == pytest.approx(8.5 * 16000, abs=1100)  # AAC pads to whole frames of 1024


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("x.avi", {}, "x.avi"),
        ("x.mp4", {"size": 33}, "33 px"),
        ("x.mp4", {"fps": 0}, "0 frames"),
        ("x.mp4", {"split": "all"}, "all"),
        ("x.mp4", {"duration_s": 3.0}, "3 s"),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, name: str, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        write_clip(tmp_path / name, 1, **arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_a_media_error(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="cannot write"):
        write_clip(tmp_path / "none" / "x.mp4", 1, 8.0)
