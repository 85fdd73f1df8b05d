"""The built-in suite: it asks what the demo writes beside its clips, and clips are gone after use."""

import json
from pathlib import Path

import pytest

from seats_cli.demo.world import sample_clip
from seats_cli.demo.write import write_clip
from seats_cli.errors import UsageError
from seats_cli.lab.scoring import score
from seats_cli.lab.suite import SPLITS, SuiteClip, rendered, suite_clips


def test_samples_are_the_questions_that_are_written_beside_the_clip(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 3, 8.0, "dev", size=64, fps=2)
    written = json.loads((tmp_path / "clip.json").read_text())["questions"]
    ((clip, samples),) = suite_clips(1, 3, "dev", 8.0)
    assert [(s.family, s.question, s.answers[0], list(s.options)) for s in samples] == [
        (q["family"], q["question"], q["answer"], q.get("options", [])) for q in written
    ]
    assert [s.id for s in samples] == [f"dev-8-3-{index}" for index in range(len(written))]
    assert {s.clip for s in samples} == {clip.name} == {"dev-8-3"}


def test_right_answers_score_right_and_other_options_do_not() -> None:
    samples = [sample for _, found in suite_clips(12, 0, "test", 16.0) for sample in found]
    assert sum(bool(sample.options) for sample in samples) > 12
    for sample in samples:
        assert score(sample, sample.answers[0]).correct
        if sample.options:
            wrong = next(letter for letter in "abcd" if letter != sample.answers[0])
            assert not score(sample, wrong).correct
            assert score(sample, sample.options["abcd".index(sample.answers[0])]).correct


def test_clips_follow_each_other_and_splits_have_clips_of_their_own() -> None:
    names = [clip.name for clip, _ in suite_clips(3, 5, "ood", 16.0)]
    assert names == ["ood-16-5", "ood-16-6", "ood-16-7"]
    assert suite_clips(1, 6, "ood", 16.0) == suite_clips(3, 5, "ood", 16.0)[1:2]
    specs = [sample_clip(5, 16.0, split) for split in SPLITS]
    assert len({spec.scenes for spec in specs}) == len({spec.words for spec in specs}) == len(SPLITS)


def test_a_length_that_no_clip_has_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"8\.3 s"):
        suite_clips(1, 0, "test", 8.3)


def test_a_rendered_clip_is_there_only_inside_the_block(tmp_path: Path) -> None:
    with rendered(SuiteClip("dev", 0, 8.0), tmp_path) as path:
        assert path.name == "dev-8-0.mp4"
        assert path.stat().st_size > 10_000
        assert tmp_path in path.parents
    assert list(tmp_path.iterdir()) == []
