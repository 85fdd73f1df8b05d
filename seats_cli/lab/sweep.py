"""Every question under every setting, clip by clip; a clip is decoded and encoded once for all of them.

Each (sample, setting) gives one record, under a key that stands for all that decided it: what has a record
already is not run again.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from seats_cli import __version__
from seats_cli.batch.resume import digest_of, file_state, weights_fingerprint
from seats_cli.lab.manifest import Sample
from seats_cli.lab.records import Record, failure, success
from seats_cli.lab.settings import FULL, Setting, other_caps
from seats_cli.lab.suite import SUITE_VERSION, SuiteClip, rendered, suite_clips

if TYPE_CHECKING:
    from seats_cli.session import AskOptions, Session

Job = tuple[int, int]  # which of the clip's samples, which of the sweep's settings


@dataclass(frozen=True)
class ClipTask:
    """A clip with the samples that are about it. `made`: it is rendered when needed, else it is a file."""

    clip: str
    samples: tuple[Sample, ...]
    made: SuiteClip | None = None


@dataclass(frozen=True)
class Asking:
    """How every question is asked, whatever the setting."""

    max_new_tokens: int = 32
    fps: float = 2.0
    max_frames: int = 768

    def options(self, setting: Setting, sample: Sample | None = None) -> "AskOptions":
        """The call's options; methods that draw at random draw anew for every clip."""
        from seats_cli.session import AskOptions

        return AskOptions(
            ratio=setting.ratio,
            method=setting.method,
            preset=setting.preset,
            settings=dict(setting.settings),
            max_new_tokens=self.max_new_tokens,
            seed=zlib.crc32(sample.clip.encode()) if sample else 0,
            fps=self.fps,
            max_frames=self.max_frames,
            start_s=sample.start_s if sample else None,
            end_s=sample.end_s if sample else None,
        )


@dataclass(frozen=True)
class Described:
    """What only a loaded model can tell.

    model:       what decides its answers: name, weights, dtype, kind of device
    environment: as in a report
    resolved:    for each setting, the presets and options that it comes to
    """

    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    resolved: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Listener:
    """Where a sweep tells what happens. `record` gets each record once it is kept, clips in order.

    progress: answers there are, of how many
    warn:     a loss, and the clip that it is about
    """

    record: Callable[[Record], None] = lambda _: None
    progress: Callable[[int, int], None] = lambda *_: None
    warn: Callable[[str, str | None], None] = lambda *_: None


class Team(Protocol):
    """Whoever answers: a session in this process, or several in others (workers.py)."""

    @property
    def described(self) -> Described:
        """The model at work."""
        ...

    @property
    def size(self) -> int:
        """How many sessions there are."""
        ...

    def run(
        self, work: Sequence[tuple[ClipTask, tuple[Job, ...]]], listener: Listener
    ) -> Iterator[tuple[int, Job, Record]]:
        """(index into `work`, job, record without its key), a clip's own in order."""
        ...


# ---- what there is to do ----------------------------------------------------------------------------------


def suite_tasks(n: int, seed: int, split: str, seconds: float) -> list[ClipTask]:
    """The built-in suite's clips as tasks."""
    return [ClipTask(clip.name, samples, clip) for clip, samples in suite_clips(n, seed, split, seconds)]


def manifest_tasks(samples: Iterable[Sample]) -> list[ClipTask]:
    """A manifest's samples, those of one clip together, clips in order of appearance."""
    by_clip: dict[str, list[Sample]] = {}
    for sample in samples:
        by_clip.setdefault(sample.clip, []).append(sample)
    return [ClipTask(clip, tuple(found)) for clip, found in by_clip.items()]


def describe(session: "Session", settings: Sequence[Setting], asking: Asking) -> Described:
    """What the session is, and what each setting comes to on it.

    Raises PlanError or UsageError for a preset that does not fit the model.
    """
    from seats_cli.measure.report import jsonable

    environment = jsonable(session.environment)
    names = ("model", "revision", "family", "parameters", "dtype", "quantization", "random_weights")
    model = {name: environment[name] for name in names}
    model["device"] = environment["device"].partition(":")[0]
    model["weights"] = weights_fingerprint(session.options.model)
    return Described(model, environment, tuple(resolve(session, setting, asking) for setting in settings))


def resolve(session: "Session", setting: Setting, asking: Asking) -> dict[str, Any]:
    """The preset's numbers and the options that a setting runs with; of `full`, only what it depends on."""
    from seats_cli.measure.report import jsonable

    setup = session.setup(asking.options(setting))
    preset, options = jsonable(setup.preset), jsonable(setup.options)
    if setting.method == FULL:
        return {"preset": {key: preset[key] for key in ("name", "caps")}}
    for key in ("geometry", "provenance", "options"):  # no number of a plan; what `options` has anyway
        del preset[key]
    del options["seed"]  # each clip has its own
    return {"preset": preset, "options": options}


def check_caps(settings: Sequence[Setting], described: Described) -> None:
    """Raises UsageError for a preset whose caps are not those of full tokens on this model."""
    caps = [resolved["preset"]["caps"] for resolved in described.resolved]
    for setting, own in zip(settings, caps, strict=True):
        if own != caps[0]:
            raise other_caps(str(setting.preset))


@cache
def code_digest() -> str:
    """What tells this package's sources from another version's; the command line's decide no answer."""
    return _sources_digest(Path(__file__).parents[1])


def _sources_digest(package: Path) -> str:
    digest = hashlib.sha256()
    paths = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    for name in sorted(name for name in paths if not name.startswith("cli/")):
        content = paths[name].read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def keys_of(
    tasks: Sequence[ClipTask], settings: Sequence[Setting], asking: Asking, described: Described
) -> list[dict[Job, str]]:
    """For each task the key of each of its jobs. Settings that come to the same have the same keys.

    A key stands for the sample, the clip's file, the setting as resolved, how it is asked, the model, and the
    code: answers of two versions of this package are never taken for one another's.
    """
    run = {"seats": __version__, "code": code_digest(), "model": described.model, "asking": asdict(asking)}
    rows = [
        digest_of([run, setting.method, setting.ratio, resolved])
        for setting, resolved in zip(settings, described.resolved, strict=True)
    ]
    found = []
    for task in tasks:
        made = task.made and {**asdict(task.made), "suite": SUITE_VERSION}
        keys: dict[Job, str] = {}
        for i, sample in enumerate(task.samples):
            about = {
                **asdict(sample),
                "media": None if made else [str(sample.media.absolute()), file_state(sample.media)],
                "made": made,
            }
            digest = digest_of(about)
            keys |= {(i, k): digest_of([digest, row])[:24] for k, row in enumerate(rows)}
        found.append(keys)
    return found


# ---- doing it ---------------------------------------------------------------------------------------------


def sweep(
    team: Team,
    tasks: Sequence[ClipTask],
    keys: Sequence[Mapping[Job, str]],
    kept: dict[str, Record],
    listener: Listener,
) -> None:
    """Run a job for every key that is not in `kept`, put its record there and tell the listener of it.

    Clips are told of in order. When this is interrupted, what was finished out of order is told of on the way
    out, so that nothing finished is lost.
    """
    missing = [_missing(jobs, kept) for jobs in keys]
    places = [place for place, jobs in enumerate(missing) if jobs]
    work = [(tasks[place], missing[place]) for place in places]
    total = sum(len(set(jobs.values())) for jobs in keys)
    done = total - sum(map(len, missing))
    waiting: list[list[Record]] = [[] for _ in work]
    left = [len(jobs) for _, jobs in work]
    head = 0

    def tell(record: Record) -> None:
        kept[record["key"]] = record
        listener.record(record)

    listener.progress(done, total)
    try:
        for index, job, record in team.run(work, listener) if work else ():
            waiting[index].append({"key": keys[places[index]][job], **record})
            left[index] -= 1
            done += 1
            while head < len(work) and waiting[head]:
                while waiting[head]:
                    tell(waiting[head].pop(0))
                head += not left[head]
            listener.progress(done, total)
    finally:
        for records in waiting:
            for record in records:
                tell(record)


def _missing(jobs: Mapping[Job, str], kept: Mapping[str, Record]) -> tuple[Job, ...]:
    """The jobs whose keys nobody has; of those with one key, the first."""
    first: dict[str, Job] = {}
    for job, key in jobs.items():
        if key not in kept:
            first.setdefault(key, job)
    return tuple(first.values())


def by_setting(
    settings: Sequence[Setting], keys: Sequence[Mapping[Job, str]], kept: Mapping[str, Record]
) -> dict[Setting, list[Record]]:
    """What there is for each setting, in the order of the tasks and whoever found it."""
    found: dict[Setting, list[Record]] = {setting: [] for setting in settings}
    for jobs in keys:
        for (_, k), key in jobs.items():
            if key in kept:
                found[settings[k]].append(kept[key])
    return found


@dataclass(frozen=True)
class Alone:
    """A team of one: the session of this process. `at` is told of each clip before it is read."""

    session: "Session"
    settings: Sequence[Setting]
    asking: Asking
    described: Described
    at: Callable[[ClipTask], None] = lambda _: None
    size: int = 1

    def run(
        self, work: Sequence[tuple[ClipTask, tuple[Job, ...]]], listener: Listener
    ) -> Iterator[tuple[int, Job, Record]]:
        """Clip after clip."""
        for index, (task, jobs) in enumerate(work):
            self.at(task)
            for job, record in run_clip(self.session, task, jobs, self.settings, self.asking):
                yield index, job, record


def run_clip(
    session: "Session",
    task: ClipTask,
    jobs: Sequence[Job],
    settings: Sequence[Setting],
    asking: Asking,
    folder: Path | None = None,
) -> Iterator[tuple[Job, Record]]:
    """The records of these jobs. The clip is decoded and encoded once for all that look at it alike.

    What fails becomes a record that says so. folder: where a clip that must be rendered lies meanwhile.
    """
    left = list(jobs)
    try:
        with _file_of(task, folder) as media:
            for group in _alike(session, task, jobs, settings, asking):
                for job, record in _run_group(session, task, media, group, settings, asking):
                    left.remove(job)
                    yield job, record
    except Exception as error:  # it cannot be rendered
        for job in left:
            yield job, failure(task.samples[job[0]], settings[job[1]], error)


@contextmanager
def _file_of(task: ClipTask, folder: Path | None) -> Iterator[Path]:
    if task.made is None:
        yield task.samples[0].media
    else:
        with rendered(task.made, folder) as path:
            yield path


def _alike(
    session: "Session", task: ClipTask, jobs: Sequence[Job], settings: Sequence[Setting], asking: Asking
) -> list[list[Job]]:
    """The jobs in groups that one reading of the clip serves."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        options = asking.options(settings[job[1]], task.samples[job[0]])
        preset = session.setup(options).preset
        groups.setdefault((options.sampling, preset.windows, preset.caps), []).append(job)
    return list(groups.values())


def _run_group(
    session: "Session",
    task: ClipTask,
    media: Path,
    jobs: Sequence[Job],
    settings: Sequence[Setting],
    asking: Asking,
) -> Iterator[tuple[Job, Record]]:
    try:
        read = session.read(media, asking.options(settings[jobs[0][1]], task.samples[jobs[0][0]]))
    except Exception as error:
        for i, k in jobs:
            yield (i, k), failure(task.samples[i], settings[k], error)
        return
    for i, k in jobs:
        sample, setting = task.samples[i], settings[k]
        try:
            answer = session.ask(read, sample.question, asking.options(setting, sample))
            record = success(sample, setting, answer)
        except Exception as error:
            record = failure(sample, setting, error)
        yield (i, k), record
