"""Plans are compared on the same questions, and full tokens stand in for answers that nobody gave."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from seats_cli.errors import SeatsError, UsageError
from seats_cli.lab import trials
from seats_cli.lab.manifest import Sample
from seats_cli.lab.records import failure
from seats_cli.lab.scoring import score
from seats_cli.lab.settings import Setting
from seats_cli.lab.suite import SuiteClip
from seats_cli.lab.sweep import Asking, ClipTask, Described, Listener
from seats_cli.lab.trials import Trials, mean_right, on_disk, with_answers
from seats_cli.presets import CalibratedRow, load_preset


def record(name: str, correct: bool | None, error: Any = None) -> dict[str, Any]:
    known = {"id": name, "clip": name, "family": "all", "correct": correct, "wer": None, "error": error}
    return {**known, "retention": 0.1, "compute_ratio": 0.1, "prefill_s": 0.1, "generate_s": 0.1}


UNPLANNED = {"kind": "plan", "message": "too small", "hint": None}


def test_a_question_without_a_plan_is_wrong() -> None:
    assert mean_right([record("a", True), record("b", None, UNPLANNED), record("c", True)]) == pytest.approx(
        2 / 3
    )


def test_a_question_that_failed_stops_the_comparison() -> None:
    broken = {"kind": "media", "message": "is damaged", "hint": None}
    with pytest.raises(SeatsError, match="b: is damaged"):
        mean_right([record("a", True), record("b", None, broken)])


def sample(name: str, *answers: str, options: tuple[str, ...] = ()) -> Sample:
    return Sample(name, Path(f"{name}.mp4"), "which?", answers, options, "all", name)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What full tokens answer, by sample; nothing runs."""
    answers: dict[str, str] = {}

    def run(gather: Any, tasks: Sequence[ClipTask], settings: Sequence[Setting], *_: Any) -> Any:
        asked = [one for task in tasks for one in task.samples]
        for one in asked:  # as a sweep does with every answer
            score(one, answers.get(one.id, ""))
        found = [
            {**record(one.id, True), "answer": answers[one.id]}
            if one.id in answers
            else failure(one, settings[0], SeatsError("broken"))
            for one in asked
        ]
        return {settings[0]: found}

    monkeypatch.setattr(trials, "run", run)
    return answers


def test_answers_come_from_full_tokens_where_nobody_gave_one(said: dict[str, str]) -> None:
    said |= {"open": " a red car ", "choice": "The answer is B.", "vague": "perhaps", "empty": "  "}
    colours = ("red", "blue")
    samples = [
        sample("known", "yes"),
        sample("open"),
        sample("choice", options=colours),
        sample("vague", options=colours),
        sample("empty"),
        sample("failed"),
    ]
    tasks = [ClipTask(one.clip, (one,)) for one in samples]
    warned: list[str] = []
    listener = Listener(warn=lambda message, clip: warned.append(message))
    found = with_answers(None, tasks, Asking(), None, listener)  # type: ignore[arg-type]  # never called
    assert {task.clip: task.samples[0].answers for task in found} == {
        "known": ("yes",),
        "open": ("a red car",),
        "choice": ("B",),
    }
    assert warned == ["3 questions are left out: full tokens give them no answer"]


def test_nothing_answered_is_an_error(said: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="answer none"):
        with_answers(None, [ClipTask("a", (sample("a"),))], Asking(), None, Listener())  # type: ignore[arg-type]


class Fake:
    """A team that answers by the plan that it is given: right on as many clips as the row lets video in."""

    size = 1
    described = Described({"model": "fake"}, {}, ({"row": 0}, {"row": 1}))

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.rows = [load_preset(setting.preset or "").calibrated[0] for setting in settings]

    def run(self, work: Any, listener: Listener) -> Iterator[Any]:
        for index, (task, jobs) in enumerate(work):
            for job in jobs:
                right = int(task.clip) < 10 * self.rows[job[1]].video
                yield index, job, record(task.samples[job[0]].id, right)


def test_each_row_is_measured_with_a_preset_of_its_own(tmp_path: Path) -> None:
    @contextmanager
    def gather(settings: Sequence[Setting]) -> Iterator[Any]:
        assert [setting.ratio for setting in settings] == [0.1, 0.1]
        assert all(
            dict(setting.settings) == {"merge": "on", "schedule": "calibrated"} for setting in settings
        )
        yield Fake(settings)

    tasks = [ClipTask(str(number), (sample(str(number), "x"),)) for number in range(10)]
    measure = Trials(tasks, Asking(), load_preset("tiny"), {"merge": "on"}, tmp_path, gather)
    rows = [CalibratedRow(0.1, share, 0.1, 9, ()) for share in (0.2, 0.7)]
    assert measure(rows) == pytest.approx([0.2, 0.7])


def test_clips_of_the_suite_are_rendered_once_and_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    @contextmanager
    def rendered(clip: SuiteClip, folder: Path | None = None) -> Iterator[Path]:
        assert folder is not None
        made.append(clip.name)
        path = folder / "rendered.mp4"
        path.write_text(clip.name)
        yield path

    monkeypatch.setattr(trials, "rendered", rendered)
    clip = SuiteClip("dev", 3, 16.0)
    tasks = [
        ClipTask(clip.name, (sample("a", "x"), sample("b", "y")), clip),
        ClipTask("own", (sample("own", "z"),)),
    ]
    with on_disk(tasks) as found:
        paths = {one.media for one in found[0].samples}
        assert [path.read_text() for path in paths] == [clip.name]
        assert found[0].made is None
        assert found[1] is tasks[1]
    assert made == [clip.name]
    assert not any(path.exists() for path in paths)
