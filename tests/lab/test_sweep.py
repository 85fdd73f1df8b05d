"""The sweep: a clip read once, records as `ask` would answer, keys for what decided them, workers."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.sweeping import ASKING, QUESTIONS, SETTINGS, run, samples_of, timeless
from seats_cli.errors import MediaError, PlanError, UsageError
from seats_cli.lab import sweep as sweeping
from seats_cli.lab import workers
from seats_cli.lab.manifest import Sample
from seats_cli.lab.records import Record
from seats_cli.lab.settings import Setting, expand
from seats_cli.lab.suite import SuiteClip
from seats_cli.lab.sweep import (
    Alone,
    Asking,
    ClipTask,
    Described,
    Job,
    Listener,
    by_setting,
    check_caps,
    describe,
    keys_of,
    manifest_tasks,
    suite_tasks,
    sweep,
    weights_fingerprint,
)
from seats_cli.session import AskOptions, Session


def test_a_record_says_what_ask_answers(session: Session, plain: dict[str, Record], folder: Path) -> None:
    assert len(plain) == 2 * 3 * len(SETTINGS)
    record = next(r for r in plain.values() if (r["id"], r["method"]) == ("a1", "seats"))
    answer = session.ask(folder / "a.mp4", QUESTIONS[1], AskOptions(ratio=0.5, max_new_tokens=3))
    assert record["answer"] == answer.text
    assert record["correct"] is (answer.text.strip().lower() in ("a", "b"))
    assert record["retention"] == answer.report.retention.reached.overall
    assert record["compute_ratio"] == answer.report.compute.ratio
    assert record["tokens"]["video"] == answer.report.tokens.before.video
    assert (record["question"], record["expected"], record["family"]) == (
        QUESTIONS[1],
        ["a", "b"],
        "family 1",
    )
    assert (record["ratio"], record["preset"], record["settings"], record["error"]) == (0.5, None, {}, None)
    assert record["prefill_s"] > 0
    assert next(iter(record)) == "key"


def test_a_clip_is_encoded_once_for_all_questions_and_settings(
    session: Session, team: Alone, tasks: list[ClipTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"encode_video": 0, "encode_audio": 0, "read": 0}

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("encode_video", "encode_audio"):
        counted(type(session.adapter), name)
    session.read(tasks[0].samples[0].media)
    once = dict(calls)
    assert once["encode_video"] >= 1
    assert once["encode_audio"] >= 1
    counted(Session, "read")
    assert len(run(team, tasks)) == 24
    assert calls["read"] == 2
    for name in ("encode_video", "encode_audio"):
        assert calls[name] == 3 * once[name]  # the first read, then one for each clip


def test_presets_with_other_caps_read_the_clip_again(
    session: Session, tasks: list[ClipTask], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = Path(workers.__file__).parents[1] / "presets" / "tiny.yaml"
    geometry = session.adapter.geometry
    match = (
        f"match: {{model_types: [qwen2_5_omni], layers: {geometry.n_layers}, hidden_size: {geometry.hidden}}}"
    )
    lines = [match if text.startswith("match:") else text for text in shipped.read_text().splitlines()]
    for name, most in (("small", 4), ("large", 9)):
        text = "\n".join(lines).split("\nschedule:")[0]
        (tmp_path / f"{name}.yaml").write_text(
            f"{text}\nschedule: {{drop_layers: [], late_layer: null, entry_scale: 1.0, tau: 0.1}}\n"
            "stage_one: {video_grids: 2, audio_tokens: 50, audio_saliency_positions: 100}\n"
            "ratio_table: [{ratio: 0.5, video: 0.5, audio: 0.5}]\n"
            f"tokens: {{min_per_grid: 1, max_per_grid: {most}, total: 1000}}\n"
        )
    files = [str(tmp_path / "small.yaml"), str(tmp_path / "large.yaml")]
    settings = (
        *expand(["seats", "random"], [0.5], preset=files[0])[1:],
        *expand(["seats", "random"], [0.5], preset=files[1])[1:],
    )
    settings = (*expand(["full"], [0.5]), *settings)
    assert len(settings) == 5
    reads = []
    original = Session.read

    def read(self: Session, media: Path, options: AskOptions) -> Any:
        reads.append(options.preset)
        return original(self, media, options)

    monkeypatch.setattr(Session, "read", read)
    team = Alone(session, settings, ASKING, describe(session, settings, ASKING))
    kept: dict[str, Record] = {}
    sweep(team, tasks[:1], keys_of(tasks[:1], settings, ASKING, team.described), kept, Listener())
    assert len(reads) == len(set(reads)) == 3  # the checkpoint's own caps, and the two
    video = {
        preset: {r["tokens"]["video"] for r in kept.values() if r["preset"] == preset}
        for preset in [None, *files]
    }
    assert all(len(found) == 1 for found in video.values())
    assert min(video[files[0]]) < min(video[files[1]])
    check_caps(settings[:1] * 2, replace(team.described, resolved=team.described.resolved[:1] * 2))
    with pytest.raises(UsageError, match=r"small\.yaml has other token caps"):
        check_caps(settings, team.described)


# ---- keys and what is known already -----------------------------------------------------------------------


def test_what_is_known_is_not_run_again(team: Alone, tasks: list[ClipTask], plain: dict[str, Record]) -> None:
    seen: list[Record] = []
    counts: list[tuple[int, int]] = []
    all_but_one = dict(list(plain.items())[:-1])
    kept = run(team, tasks, all_but_one, record=seen.append, progress=lambda *n: counts.append(n))
    assert [record["key"] for record in seen] == [list(plain)[-1]]
    assert counts == [(23, 24), (24, 24)]
    assert timeless(kept) == timeless(plain)
    run(team, tasks, kept, record=seen.append)
    assert len(seen) == 1


def test_the_key_changes_with_whatever_decides_an_answer(
    team: Alone, tasks: list[ClipTask], folder: Path
) -> None:
    def key(
        sample: Sample = tasks[0].samples[0],
        setting: Setting = SETTINGS[1],
        asking: Asking = ASKING,
        described: Described = team.described,
    ) -> str:
        found = keys_of(
            [ClipTask(sample.clip, (sample,))],
            [setting],
            asking,
            replace(described, resolved=described.resolved[1:2]),
        )
        return found[0][0, 0]

    sample, setting = tasks[0].samples[0], SETTINGS[1]
    resolved = dict(team.described.resolved[1])
    other_options = {**resolved, "options": {**resolved["options"], "tau": 0.3}}
    keys = [
        key(),
        key(replace(sample, id="other")),
        key(replace(sample, question="other?")),
        key(replace(sample, answers=("other",))),
        key(replace(sample, family="other")),
        key(replace(sample, start_s=0.5)),
        key(replace(sample, media=folder / "b.mp4")),
        key(replace(sample, media=folder / "none.mp4")),
        key(setting=replace(setting, ratio=0.4)),
        key(setting=replace(setting, method="fixed")),
        key(asking=replace(ASKING, max_new_tokens=4)),
        key(asking=replace(ASKING, fps=1.0)),
        key(described=replace(team.described, model={**team.described.model, "dtype": "bfloat16"})),
        key(described=replace(team.described, model={**team.described.model, "weights": "others"})),
        key(described=replace(team.described, resolved=(resolved, other_options))),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    copy = folder / "copy.mp4"
    copy.write_bytes((folder / "a.mp4").read_bytes())
    first = key(replace(sample, media=copy))
    os.utime(copy, (1, 1))
    assert key(replace(sample, media=copy)) != first


def test_the_key_changes_with_the_code_that_answers(
    team: Alone, tasks: list[ClipTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys_of(tasks, SETTINGS, ASKING, team.described)
    for name in ("engine/prefill.py", "cli/ask.py", "session.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    first = sweeping._sources_digest(tmp_path)
    (tmp_path / "cli/ask.py").write_text("two")
    (tmp_path / "engine/notes.txt").touch()
    assert sweeping._sources_digest(tmp_path) == first
    (tmp_path / "engine/prefill.py").write_text("two")
    second = sweeping._sources_digest(tmp_path)
    (tmp_path / "engine/prefill.py").rename(tmp_path / "engine/decode.py")
    assert len({first, second, sweeping._sources_digest(tmp_path)}) == 3
    assert sweeping.code_digest() == sweeping._sources_digest(Path(sweeping.__file__).parents[1])
    monkeypatch.setattr(sweeping, "code_digest", lambda: first)
    after = keys_of(tasks, SETTINGS, ASKING, team.described)
    assert not {*before[0].values()} & {*after[0].values()}


def test_suite_keys_do_not_depend_on_where_a_clip_is_rendered(
    team: Alone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = keys_of(suite_tasks(1, 0, "dev", 8.0), SETTINGS, ASKING, team.described)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dev-8-0.mp4").touch()
    assert keys_of(suite_tasks(1, 0, "dev", 8.0), SETTINGS, ASKING, team.described) == keys
    assert not set(keys[0].values()) & set(
        keys_of(suite_tasks(1, 1, "dev", 8.0), SETTINGS, ASKING, team.described)[0].values()
    )


def test_settings_that_come_to_the_same_share_their_answers(session: Session, tasks: list[ClipTask]) -> None:
    settings = expand(["seats"], [0.5], vary={"merge": ["off", "on"], "preset": ["default"]})
    settings += (Setting("seats", 0.5),)  # what the default preset comes to
    team = Alone(session, settings, ASKING, describe(session, settings, ASKING))
    keys = keys_of(tasks[:1], settings, ASKING, team.described)
    seen: list[Record] = []
    kept: dict[str, Record] = {}
    sweep(team, tasks[:1], keys, kept, Listener(record=seen.append))
    assert len(seen) == 3 * 3
    found = by_setting(settings, keys, kept)
    assert [len(records) for records in found.values()] == [3, 3, 3, 3]
    assert found[settings[2]] == found[settings[3]] != found[settings[1]]


def test_weights_are_known_by_content_or_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = weights_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    second = weights_fingerprint(str(tmp_path))
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert first != second == weights_fingerprint(str(tmp_path))
    monkeypatch.setattr("seats_cli.batch.resume.HASHED_BYTES", 0)
    third = weights_fingerprint(str(tmp_path))
    os.utime(tmp_path / "model.safetensors", (2, 2))
    assert len({second, third, weights_fingerprint(str(tmp_path))}) == 3
    assert weights_fingerprint("tiny") is not None
    assert weights_fingerprint("some/repo") is None


def test_methods_that_draw_draw_anew_for_each_clip() -> None:
    seeds = {
        ASKING.options(SETTINGS[1], sample).seed
        for name in "ab"
        for sample in samples_of(Path(f"{name}.mp4"))
    }
    assert len(seeds) == 2


# ---- failures and interruptions ---------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_fails_alone(
    team: Alone, tasks: list[ClipTask], plain: dict[str, Record], tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a clip")
    bad = [*samples_of(tmp_path / "missing.mp4"), *samples_of(tmp_path / "broken.mp4")]
    kept = run(team, [*manifest_tasks(bad), *tasks])
    assert {key: kept[key] for key in plain}.keys() == plain.keys()
    failed = [record for record in kept.values() if record["error"] is not None]
    assert len(failed) == 2 * 3 * len(SETTINGS)
    assert {record["error"]["kind"] for record in failed} == {"media_missing", "media_format"}
    assert all(record["answer"] is record["correct"] is record["retention"] is None for record in failed)


def test_a_clip_that_cannot_be_rendered_fails_alone(team: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MediaError("disk full")

    monkeypatch.setattr("seats_cli.demo.write.write_clip", fail)
    task = ClipTask("x", tuple(samples_of(Path("x.mp4"))), SuiteClip("dev", 0, 8.0))
    assert {record["error"]["message"] for record in run(team, [task]).values()} == {"disk full"}


def test_an_error_in_one_answer_is_its_own_record(
    team: Alone, tasks: list[ClipTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Session.ask

    def ask(self: Session, media: Any, question: str, options: AskOptions) -> Any:
        if question == QUESTIONS[1] and options.method == "fixed":
            raise PlanError("no plan") if media.media.name == "a.mp4" else ZeroDivisionError("a bug")
        return original(self, media, question, options)

    monkeypatch.setattr(Session, "ask", ask)
    kept = run(team, tasks)
    errors = {(r["id"], r["method"]): r["error"]["kind"] for r in kept.values() if r["error"] is not None}
    assert errors == {("a1", "fixed"): "plan", ("b1", "fixed"): "error"}


def test_an_answer_that_cannot_be_scored_fails_alone(
    team: Alone, tasks: list[ClipTask], plain: dict[str, Record]
) -> None:
    first, *others = tasks[0].samples
    task = replace(tasks[0], samples=(replace(first, answers=()), *others))
    kept = run(team, [task])
    failed = {record["id"] for record in kept.values() if record["error"] is not None}
    assert failed == {first.id}
    assert len(kept) == len(plain) // 2
    assert timeless({key: kept[key] for key in kept.keys() & plain.keys()}).items() <= timeless(plain).items()
    assert len(kept.keys() & plain.keys()) == len(others) * len(SETTINGS)


class Scripted:
    """A team that finishes jobs in a given order, then may be interrupted."""

    described = Described({}, {}, ({},) * len(SETTINGS))
    size = 1

    def __init__(self, order: Sequence[int], end: BaseException | None = None) -> None:
        self.order, self.end = order, end

    def run(self, work: Sequence[Any], listener: Listener) -> Iterator[tuple[int, Job, Record]]:
        jobs = [list(jobs) for _, jobs in work]
        for index in self.order:
            job = jobs[index].pop(0)
            yield index, job, {"clip": work[index][0].clip, "job": job, "error": None}
        if self.end is not None:
            raise self.end


def clip_task(name: str) -> ClipTask:
    return ClipTask(name, (Sample(name, Path(name), "?", ("a",), (), "all", name),))


def test_clips_are_told_of_in_order_and_each_as_soon_as_it_may() -> None:
    told: list[str] = []
    tasks = [clip_task(name) for name in "abc"]
    events: list[tuple[int, int]] = []
    n = len(SETTINGS)
    order = [1] * n + [0] * (n - 1) + [2] + [0] + [2] * (n - 1)
    run(
        Scripted(order),
        tasks,
        record=lambda record: told.append(record["clip"]),
        progress=lambda done, _: events.append((done, len(told))),
    )
    assert "".join(told) == "a" * n + "b" * n + "c" * n
    assert events[n] == (n, 0)  # all of b is done, and waits
    assert events[n + 1] == (n + 1, 1)  # a is first, so each of its answers is kept at once
    assert events[3 * n] == (3 * n, 3 * n)


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RuntimeError("bug")])
def test_what_was_finished_out_of_order_is_kept_when_a_run_ends_early(end: BaseException) -> None:
    told: list[str] = []
    kept: dict[str, Record] = {}
    team = Scripted([1, 1, 0, 2], end)
    with pytest.raises(type(end)):
        run(
            team, [clip_task(name) for name in "abc"], kept, record=lambda record: told.append(record["clip"])
        )
    assert "".join(told) == "abbc"
    assert len(kept) == 4
