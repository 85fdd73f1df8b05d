"""How well plans do on clips: what the optimiser of `calibrate.py` asks."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from seats_cli import __version__
from seats_cli.errors import SeatsError, UsageError
from seats_cli.lab.manifest import Sample
from seats_cli.lab.records import Record, has_failed, is_unplanned
from seats_cli.lab.results import summarise
from seats_cli.lab.scoring import LETTERS, choose_option
from seats_cli.lab.settings import FULL, Setting
from seats_cli.lab.suite import SUITE_VERSION, rendered
from seats_cli.lab.sweep import (
    Asking,
    ClipTask,
    Listener,
    Team,
    by_setting,
    code_digest,
    file_state,
    keys_of,
    sweep,
    weights_fingerprint,
)
from seats_cli.presets import CalibratedRow, Preset
from seats_cli.presets.writing import write_preset

Gather = Callable[[Sequence[Setting]], AbstractContextManager[Team]]
"""Who answers questions under these settings."""


@dataclass(frozen=True)
class Trials:
    """Measures plans: each row's accuracy over the tasks, as `seats eval` would report it.

    preset:   whose calibrated rows are tried, one file a row, written to `folder`
    settings: of every trial, as `--set` gives them
    """

    tasks: Sequence[ClipTask]
    asking: Asking
    preset: Preset
    settings: Mapping[str, str]
    folder: Path
    gather: Gather
    listener: Listener = field(default_factory=Listener)

    def __call__(self, rows: Sequence[CalibratedRow]) -> list[float]:
        """The mean over families of the share right, of each row, all over the same questions: one for which
        a row has no plan counts as wrong. Raises SeatsError where a question failed."""
        pairs = tuple(sorted({**self.settings, "schedule": "calibrated"}.items()))
        settings = []
        for number, row in enumerate(rows):
            path = self.folder / f"trial-{number}.yaml"
            write_preset(replace(self.preset, calibrated=(row,)), path)
            settings.append(Setting("seats", row.ratio, str(path), pairs))
        found = run(self.gather, self.tasks, settings, self.asking, self.listener)
        return [mean_right(records) for records in found.values()]


def searched_as(tasks: Sequence[ClipTask], model: Mapping[str, Any], about: Sequence[object]) -> str:
    """A key for a search: of the code, the model's weights, the clips and questions, and `about` the rest."""
    questions = [
        [
            asdict(sample),
            SUITE_VERSION if task.made else [str(sample.media.absolute()), file_state(sample.media)],
        ]
        for task in tasks
        for sample in task.samples
    ]
    named = {key: value for key, value in model.items() if key != "offline"}
    whole = [__version__, code_digest(), weights_fingerprint(model["model"]), named, questions, about]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=repr).encode()).hexdigest()[:24]


def mean_right(records: Sequence[Record]) -> float:
    """The mean over families of the share right; no plan counts as wrong. Raises SeatsError for a failure."""
    for record in records:
        if has_failed(record):
            error = record["error"]
            raise SeatsError(
                f"{record['clip']}: {error['message']}",
                hint=error["hint"] or "plans are compared on the same questions: leave this clip out",
            )
    (row,) = summarise(
        {_ANY: [{**record, **_WRONG} if is_unplanned(record) else record for record in records]}
    )
    return row.accuracy or 0.0


_ANY = Setting("seats", 0.5)
_WRONG = {
    "error": None,
    "correct": False,
    "retention": 0.0,
    "compute_ratio": 0.0,
    "prefill_s": 0.0,
    "generate_s": 0.0,
}


def run(
    gather: Gather, tasks: Sequence[ClipTask], settings: Sequence[Setting], asking: Asking, listener: Listener
) -> dict[Setting, list[Record]]:
    """Every question under every setting."""
    kept: dict[str, Record] = {}
    with gather(settings) as team:
        keys = keys_of(tasks, settings, asking, team.described)
        sweep(team, tasks, keys, kept, listener)
    return by_setting(settings, keys, kept)


def with_answers(
    gather: Gather, tasks: Sequence[ClipTask], asking: Asking, preset: str | None, listener: Listener
) -> list[ClipTask]:
    """The tasks whose samples all have an answer to compare with: where one has none, the one that full
    tokens give, as a letter where there are options.

    Samples that full tokens do not answer, or with no option, are left out with a warning. Raises UsageError
    where none is left."""
    if all(sample.answers for task in tasks for sample in task.samples):
        return list(tasks)
    full = Setting(FULL, 1.0, preset)
    asked = [replace(task, samples=tuple(map(_askable, task.samples))) for task in tasks]
    records = run(gather, asked, [full], asking, listener)[full]
    said = {record["id"]: record["answer"] for record in records if record["error"] is None}
    found, left_out = [], 0
    for task in tasks:
        samples = tuple(
            sample if sample.answers else replace(sample, answers=(answer,))
            for sample in task.samples
            if sample.answers or (answer := _as_answer(sample, said.get(sample.id, "")))
        )
        left_out += len(task.samples) - len(samples)
        if samples:
            found.append(replace(task, samples=samples))
    if not found:
        raise UsageError("full tokens answer none of these questions, so no plan can be judged by them")
    if left_out:
        listener.warn(f"{left_out} questions are left out: full tokens give them no answer", None)
    return found


def _askable(sample: Sample) -> Sample:
    """The sample with something to be scored by, whose score nobody reads."""
    return sample if sample.answers else replace(sample, answers=(LETTERS[0] if sample.options else "-",))


def _as_answer(sample: Sample, said: str) -> str:
    """What counts as right where full tokens said this; "" for nothing."""
    if not sample.options:
        return said.strip()
    chosen = choose_option(said, sample.options)
    return "" if chosen is None else LETTERS[chosen]


@contextmanager
def on_disk(
    tasks: Sequence[ClipTask], progress: Callable[[int, int], None] = lambda *_: None
) -> Iterator[list[ClipTask]]:
    """The tasks with every clip of the suite rendered once, in a folder that is gone after the block.

    progress: clips done, of how many."""
    with TemporaryDirectory(prefix="seats-trials-") as place:
        found: list[ClipTask] = []
        for task in tasks:
            progress(len(found), len(tasks))
            if task.made is None:
                found.append(task)
                continue
            path = Path(place) / f"{task.made.name}.mp4"
            with rendered(task.made, Path(place)) as made:
                shutil.move(made, path)
            samples = tuple(replace(sample, media=path) for sample in task.samples)
            found.append(ClipTask(task.clip, samples))
        yield found
