"""A trace's short cuts change nothing, and its document says what the records do."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from make_clips import tone, write_clip, write_picture
from seats_cli.engine.decode import decode_step
from seats_cli.errors import UsageError
from seats_cli.lab import reading as readings
from seats_cli.lab import trace
from seats_cli.lab.manifest import Sample
from seats_cli.lab.reading import Reading, read_with_answer
from seats_cli.lab.records import Record
from seats_cli.lab.sweep import ClipTask, Listener, keys_of, manifest_tasks, sweep
from seats_cli.lab.trace import trace_clip
from seats_cli.lab.trace_document import curves_of_records, of_full, read_document
from seats_cli.lab.trace_team import TracingAlone, TracingCrew, describe_trace
from seats_cli.lab.tracing import ENTRIES, KEEPS, KINDS, Tracing, full_setting, with_fewer_questions
from seats_cli.selection.budget import keep_best
from seats_cli.selection.contract import Drop, Kept, MediaTokens, Method, drop_to, keep_everything
from seats_cli.selection.diversity import choose_diverse, merge_dropped
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.plan import ClipCounts, Plan, Stage, spread_total
from seats_cli.selection.planning import full_plan
from seats_cli.session import AskOptions, ReadClip, Session

SETTING = full_setting(None, {})
TRACING = Tracing(max_new_tokens=4)
OPTIONS = AskOptions(method="full", ratio=1.0, max_new_tokens=4)
CODES = {"video": (VIDEO,), "audio": (AUDIO,), "both": (VIDEO, AUDIO)}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def sample(tasks: list[ClipTask]) -> Sample:
    return tasks[0].samples[0]


@pytest.fixture(scope="module")
def clip(session: Session, sample: Sample) -> ReadClip:
    return session.read(sample.media, OPTIONS)


@pytest.fixture(scope="module")
def reading(session: Session, clip: ReadClip, sample: Sample) -> Reading:
    with torch.inference_mode():
        return read_with_answer(session, clip, sample, OPTIONS)[0]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The answer's logits at each point, as the points are measured."""
    rows: list[torch.Tensor] = []
    original = readings.answer_logits

    def spy(reading: Reading, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(original(reading, hidden))
        return rows[-1]

    monkeypatch.setattr(readings, "answer_logits", spy)
    return rows


class Cutting(Method):
    """From the start, as a method of one's own: `keep` (text, video, audio) counts after one layer."""

    summary = source = "a test"
    name = "cutting"

    def __init__(self, after: int, keep: tuple[int, int, int], *, scored: bool = False) -> None:
        self.after, self.keep, self.scored = after, keep, scored

    def plan(self, preset: Any, ratio: float, counts: ClipCounts, options: Any) -> Plan:
        plan = full_plan(self.name, preset, counts, options)
        stages = (Stage("stage I", 0, counts.n_video, counts.n_audio), Stage("cut", self.after, 0, 0))
        return replace(plan, stages=stages, score_layers=(self.after,) if self.scored else ())

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        kept = keep_everything(tokens)
        n = self.keep[CODES[tokens.kind][0]] if not self.after else len(kept.indices)
        return Kept(kept.indices[:n], kept.embeddings[:n])

    def after_layer(self, layer: int, scores: torch.Tensor | None, layout: TokenLayout, plan: Plan) -> Drop:
        kind = layout.kind.to(torch.int64)
        scores = torch.zeros(len(layout)) if scores is None else scores
        return drop_to(keep_best(scores, kind, torch.tensor((len(layout), *self.keep[1:]))), self.keep)


def asked_from_the_start(session: Session, reading: Reading, method: Method) -> torch.Tensor:
    """The answer's logits when a method runs through the whole session and the answer token by token."""
    options = replace(OPTIONS, method=method, ratio=0.5)
    run = session.prefill(reading.clip, reading.sample.question, options)
    rows = [run.read.logits]
    for step, token in enumerate(reading.target.fed):
        rows.append(decode_step(session.adapter, token, run.prompt.next_position + step, run.read.cache))
    return torch.stack(rows)


# ---- the points --------------------------------------------------------------------------------------------


def test_removal_equals_the_same_removal_from_the_start(
    session: Session, reading: Reading, seen: list[torch.Tensor]
) -> None:
    full = trace.after_cut(reading, 6, torch.arange(len(reading.layout)), reading.layout.counts)
    expected = seen[-1]
    points = list(trace.removal(reading, full, replace(TRACING, layers=(1, 2, 4, 6))))
    places = [point for point, _ in points]
    assert places == [{"kind": kind, "layer": layer} for kind in KINDS for layer in (1, 2, 4, 6, 7)]
    measured = iter(seen[1:])
    for (point, outcome), kind in zip(points, [k for k in KINDS for _ in range(5)], strict=True):
        if point["layer"] == 7:
            assert outcome is full
            continue
        method = Cutting(point["layer"] - 1, _kept(reading, kind))
        logits = next(measured)
        torch.testing.assert_close(logits, asked_from_the_start(session, reading, method), atol=1e-4, rtol=0)
        assert (logits - expected).abs().max() > 1e-2  # else this test could not fail
        answer = session.ask(reading.clip, reading.sample.question, replace(OPTIONS, method=method)).text
        assert (outcome.answer if outcome.answer is not None else reading.target.text) == answer
        assert outcome.agreement == (answer == reading.target.text)


def test_choice_equals_the_same_choice_from_the_start(
    session: Session, reading: Reading, seen: list[torch.Tensor]
) -> None:
    points = list(trace.choice(reading, replace(TRACING, layers=(1, 3, 6))))
    assert len(points) == 2 * len(KEEPS)  # nothing comes after the last layer
    counts = reading.layout.counts
    n_text = counts[TEXT] - len(reading.target.fed)
    for (point, _), logits in zip(points, seen, strict=True):
        assert point["kind"] == "both"
        keep = tuple(max(1, round(point["keep"] * counts[code])) for code in (VIDEO, AUDIO))
        method = Cutting(point["after_layer"], (n_text, *keep), scored=True)  # type: ignore[arg-type]
        torch.testing.assert_close(logits, asked_from_the_start(session, reading, method), atol=1e-4, rtol=0)


def test_entry_is_stage_one_s_choice_of_one_kind(
    session: Session, reading: Reading, seen: list[torch.Tensor]
) -> None:
    class Entering(Cutting):
        """The rule of stage I, said here once more; windows share their rounding."""

        def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
            n, window = len(tokens.embeddings), plan.window(tokens.kind)
            assert n <= window  # so that all of it is one window
            if tokens.kind != kind:
                return keep_everything(tokens)
            assert tokens.saliency is not None
            total = spread_total(share, n, window)
            keep = choose_diverse(tokens.embeddings[None], tokens.saliency[None], total)[0]
            return Kept(keep, merge_dropped(tokens.embeddings[None], keep[None])[0])

    points = list(trace.entry(reading, TRACING))
    assert [(p["kind"], p["entry"]) for p, _ in points] == [
        (kind, share) for kind in ("video", "audio") for share in ENTRIES
    ]
    for (point, _), logits in zip(points, seen, strict=True):
        kind, share = point["kind"], point["entry"]
        everything = Entering(6, (0, 0, 0))
        run = session.prefill(
            reading.clip, reading.sample.question, replace(OPTIONS, method=Unchanged(everything))
        )
        torch.testing.assert_close(logits[0], run.read.logits, atol=1e-4, rtol=0)


class Unchanged(Method):
    """Another method's hook before the LLM, and nothing inside it."""

    name, summary, source = "unchanged", "a test", "a test"

    def __init__(self, inner: Method) -> None:
        self.inner = inner

    def plan(self, preset: Any, ratio: float, counts: ClipCounts, options: Any) -> Plan:
        return replace(full_plan(self.name, preset, counts, options), needs_saliency=True)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        return self.inner.before_llm(tokens, plan)


def test_likelihood_and_probability_are_those_of_the_answer(
    session: Session, reading: Reading, sample: Sample
) -> None:
    _, full = read_with_answer(session, reading.clip, sample, OPTIONS)
    method = Unchanged(Cutting(1, (0, 0, 0)))
    logits = asked_from_the_start(session, reading, method)
    likely = logits.log_softmax(-1)
    known = [float(likely[row, token]) for row, token in enumerate(reading.target.ids)]
    if reading.target.ended:
        known.append(float(likely[-1, list(session.adapter.eos_token_ids)].logsumexp(0)))
    assert full.log_likelihood == pytest.approx(np.mean(known), abs=1e-4)
    assert full.probability == pytest.approx(np.exp(np.sum(known)), rel=1e-3)
    assert full.agreement
    assert full.answer is None


def test_an_answer_that_ends_is_measured_to_its_end(
    session: Session, clip: ReadClip, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the answer is declared an end, so that the answer stops there by itself."""
    ids = read_with_answer(session, clip, sample, OPTIONS)[0].target.ids
    stop = next(i for i in range(1, len(ids)) if ids[i] not in ids[:i])
    monkeypatch.setattr(session.adapter, "eos_token_ids", (ids[stop],))
    reading, full = read_with_answer(session, clip, sample, OPTIONS)
    assert (reading.target.ids, reading.target.ended) == (ids[:stop], True)
    assert full.agreement
    method = Unchanged(Cutting(1, (0, 0, 0)))
    likely = asked_from_the_start(session, reading, method).log_softmax(-1)
    known = [float(likely[row, token]) for row, token in enumerate((*ids[:stop], ids[stop]))]
    assert full.log_likelihood == pytest.approx(np.mean(known), abs=1e-4)
    record = trace.trace_sample(session, clip, sample, SETTING, replace(TRACING, curves=("removal",)))
    agreed = []
    for row in record["removal"]:
        if row["layer"] <= 6:
            method = Cutting(row["layer"] - 1, _kept(reading, row["kind"]))
            answer = session.ask(clip, sample.question, replace(OPTIONS, method=method))
            same = answer.text == reading.target.text and answer.report.tokens.finish_reason == "stop"
            agreed.append(same)
            assert row["agreement"] == same
    assert {True, False} == set(agreed)  # else this test could not fail


def _kept(reading: Reading, kind: str) -> tuple[int, int, int]:
    text, video, audio = reading.layout.counts
    text -= len(reading.target.fed)
    return text, 0 if VIDEO in CODES[kind] else video, 0 if AUDIO in CODES[kind] else audio


# ---- records -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def team(session: Session) -> TracingAlone:
    return TracingAlone(session, SETTING, TRACING, describe_trace(session, SETTING, TRACING))


def traced(team: Any, tasks: list[ClipTask], kept: dict[str, Record] | None = None) -> list[Record]:
    """The records of all samples, in order."""
    kept = {} if kept is None else kept
    keys = keys_of(tasks, (SETTING,), TRACING, team.described)
    sweep(team, tasks, keys, kept, Listener())
    return [kept[key] for jobs in keys for key in jobs.values()]


@pytest.fixture(scope="module")
def records(team: TracingAlone, tasks: list[ClipTask]) -> list[Record]:
    with torch.inference_mode():
        return traced(team, tasks)


def test_a_record_has_every_point_once(records: list[Record]) -> None:
    assert len(records) == 6
    for record in records:
        assert record["error"] is None
        removed = [(row["kind"], row["layer"]) for row in record["removal"]]
        assert removed == [(kind, layer) for kind in KINDS for layer in range(1, 8)]
        chosen = {(row["kind"], row["after_layer"], row["keep"]) for row in record["choice"]}
        assert chosen == {("both", layer, keep) for layer in range(1, 6) for keep in KEEPS}
        assert len(record["choice"]) == len(chosen)
        entered = [(row["kind"], row["entry"]) for row in record["entry"]]
        assert entered == [(kind, share) for kind in KINDS[:2] for share in ENTRIES]
        assert [row["layer"] for row in record["attention"]] == list(range(1, 7))
        for row in record["attention"]:
            assert row["video"] + row["audio"] + row["text"] == pytest.approx(1, abs=1e-4)
            assert min(row["video"], row["audio"], row["text"]) > 0
        assert record["full"]["agreement"]
        assert all(row["answer"] != record["answer"] for row in record["removal"] if "answer" in row)


def test_what_is_attended_to_is_summed_by_kind(session: Session, reading: Reading) -> None:
    kind = reading.layout.kind[: reading.n_prompt]
    n = reading.n_prompt
    rotary = session.adapter.rotary(reading.layout.position[:, :n])
    for row in trace.attention(reading):
        hidden = reading.outputs[row["layer"]][None, :n]
        scores = session.adapter.last_token_attention(row["layer"] - 1, hidden, rotary)
        assert row["video"] == pytest.approx(float(scores[kind == VIDEO].sum()), abs=1e-5)
        assert row["audio"] == pytest.approx(float(scores[kind == AUDIO].sum()), abs=1e-5)


def test_a_clip_with_one_kind_has_both_gone_when_it_is(session: Session, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "sound.m4a", audio=tone(2.0))
    task = manifest_tasks([Sample("s", path, "what is said?", (), (), "all", "sound")])[0]
    ((_, record),) = trace_clip(session, task, [(0, 0)], SETTING, TRACING)
    assert record["error"] is None
    by_kind = {
        kind: [{**row, "kind": ""} for row in record["removal"] if row["kind"] == kind] for kind in KINDS
    }
    assert by_kind["video"] == []
    assert by_kind["both"] == by_kind["audio"] != []
    assert {row["kind"] for row in record["choice"]} == {"audio", "both"}
    assert {row["kind"] for row in record["entry"]} == {"audio"}
    assert all(row["correct"] is None and "answer" not in row for row in record["removal"])
    document = curves_of_records([record], 6)
    assert document["measure"] == "agreement"
    assert document["full"]["accuracy"] is None
    assert document["counts"] == {"video": 0, "audio": 50}


def test_what_cannot_be_traced_is_a_record_that_says_why(session: Session, tmp_path: Path) -> None:
    write_picture(tmp_path / "picture.png", np.zeros((56, 56, 3), np.uint8), "png", "rgb24")
    samples = [
        Sample(name, tmp_path / name, "what?", (), (), "all", name) for name in ("picture.png", "none.mp4")
    ]
    for task, words in zip(manifest_tasks(samples), ("neither video nor audio", "no such file"), strict=True):
        ((_, record),) = trace_clip(session, task, [(0, 0)], SETTING, TRACING)
        assert words in record["error"]["message"]


def test_a_worker_finds_what_a_session_here_finds(
    tiny_checkpoint_path: Path, tasks: list[ClipTask], records: list[Record]
) -> None:
    model = {"model": str(tiny_checkpoint_path), "dtype": "float32"}
    warned: list[str] = []
    with TracingCrew(["cpu"], model, (SETTING,), TRACING, warn=warned.append, log=lambda _: None) as crew:
        found = traced(crew, tasks)
    assert warned == []
    for mine, theirs in zip(found, records, strict=True):
        assert mine["id"] == theirs["id"]
        assert [row["agreement"] for row in mine["removal"]] == [r["agreement"] for r in theirs["removal"]]
        for curve in ("removal", "choice", "entry"):
            for row, other in zip(mine[curve], theirs[curve], strict=True):
                assert row["log_likelihood"] == pytest.approx(other["log_likelihood"], abs=1e-4)


def test_a_known_record_is_not_measured_again(
    team: TracingAlone, tasks: list[ClipTask], records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(session: Any, clip: Any, sample: Sample, *_: Any) -> Record:
        measured.append(sample.id)
        return {name: value for name, value in records[0].items() if name != "key"}

    monkeypatch.setattr(trace, "trace_sample", measure)
    traced(team, tasks, {record["key"]: record for record in records if record["id"] != "b1"})
    assert measured == ["b1"]


def test_what_is_measured_has_a_key_of_its_own(
    session: Session, team: TracingAlone, tasks: list[ClipTask]
) -> None:
    def keys(tracing: Tracing, settings: dict[str, str]) -> set[str]:
        setting = full_setting(None, settings)
        described = describe_trace(session, setting, tracing)
        return {key for jobs in keys_of(tasks, (setting,), tracing, described) for key in jobs.values()}

    usual = keys(TRACING, {})
    assert len(usual) == 6
    assert not usual & keys(replace(TRACING, layers=(1, 2)), {})
    assert not usual & keys(TRACING, {"merge": "off"})
    assert not usual & keys(replace(TRACING, max_new_tokens=5), {})
    assert usual == keys(TRACING, {"tau": "0.3"})  # no curve depends on it


def test_layers_that_are_measured(session: Session) -> None:
    assert TRACING.choice_layers(20) == list(range(1, 20))
    assert TRACING.choice_layers(28) == list(range(1, 28, 2))
    some = replace(TRACING, layers=(4, 6))
    assert (some.removal_layers(6), some.choice_layers(6)) == ([1, 4, 6], [4])
    with pytest.raises(UsageError, match="--layers 9: this model has 6 layers"):
        describe_trace(session, SETTING, replace(TRACING, layers=(4, 9)))


def test_fewer_questions_take_turns_by_family() -> None:
    def task(name: str, families: str) -> ClipTask:
        path = Path(name)
        samples = [Sample(f"{name}{i}", path, "?", (), (), f, name) for i, f in enumerate(families)]
        return ClipTask(name, tuple(samples))

    tasks = [task("p", "aab"), task("q", "abcc"), task("r", "ab"), task("s", "")]
    chosen = [[s.family for s in one.samples] for one in with_fewer_questions(tasks, 2)]
    assert chosen == [["a", "b"], ["a", "c"], ["a", "b"], []]
    assert with_fewer_questions(tasks, None) == tasks


# ---- the document ------------------------------------------------------------------------------------------


def outcome(agreement: bool, likelihood: float, probability: float, correct: bool | None) -> dict[str, Any]:
    return {
        "agreement": agreement,
        "log_likelihood": likelihood,
        "probability": probability,
        "correct": correct,
    }


def made_record(name: str, clip: str, family: str, removed: list[bool], answered: bool = True) -> Record:
    rows = [
        {"kind": "both", "layer": layer, **outcome(right, -0.5 * layer, 0.1 * layer, right and answered)}
        for layer, right in enumerate(removed, 1)
    ]
    return {
        "id": name,
        "clip": clip,
        "family": family,
        "expected": ["x"] if answered else [],
        "tokens": {"video": 100, "audio": 20 if clip == "p" else 40},
        "full": outcome(True, -0.1, 0.9, answered),
        "removal": rows,
        "attention": [{"layer": 1, "video": 0.5 if clip == "p" else 0.3, "audio": 0.2, "text": 0.3}],
        "error": None,
    }


def test_the_document_says_what_the_records_do() -> None:
    records = [
        made_record("1", "p", "a", [True, True]),
        made_record("2", "p", "a", [False, True]),
        made_record("3", "q", "b", [False, True]),
        {**made_record("4", "q", "b", [True, True]), "error": {"kind": "media"}},
    ]
    document = curves_of_records(records, 1)
    assert (document["measure"], document["samples"], document["clips"]) == ("accuracy", 3, 2)
    assert document["counts"] == {"video": 100, "audio": pytest.approx(80 / 3)}
    first, second = document["removal"]
    assert (first["kind"], first["layer"], first["n"]) == ("both", 1, 3)
    assert first["accuracy"] == pytest.approx(0.25)  # the mean of 1/2 and 0
    assert first["agreement"] == pytest.approx(1 / 3)
    assert first["log_likelihood"] == pytest.approx(-0.5)
    assert first["probability"] == pytest.approx(0.1)
    assert (first["low"], first["high"]) == (0.0, 0.5)  # either clip alone, or both
    assert (second["accuracy"], second["low"], second["high"]) == (1.0, 1.0, 1.0)
    (looked,) = document["attention"]
    assert looked["video"] == pytest.approx(1.3 / 3)
    assert document["choice"] == document["entry"] == []
    assert first["full"].keys() == {"accuracy", "agreement", "log_likelihood", "probability"}
    for key in first["full"]:
        assert first["full"][key] == pytest.approx(document["full"][key])


def test_a_point_that_some_questions_lack_is_told_beside_their_own_full_tokens() -> None:
    records = [made_record("1", "p", "a", [True]), made_record("2", "q", "b", [False])]
    records[0]["full"] = {**records[0]["full"], "probability": 0.5}
    records[1]["full"] = {**records[1]["full"], "probability": 1.0}
    records[1]["removal"] = []
    trace = curves_of_records(records, 1)
    (row,) = trace["removal"]
    assert (row["n"], trace["full"]["n"], trace["full"]["probability"]) == (1, 2, 0.75)
    assert row["full"]["probability"] == 0.5
    assert of_full(trace, row, "probability") == pytest.approx(row["probability"] / 0.5)
    del row["full"]  # as older versions wrote it
    with pytest.raises(UsageError, match="points over 1 of its 2 questions"):
        of_full(trace, row, "probability")
    row["n"] = 2
    assert of_full(trace, row, "probability") == pytest.approx(row["probability"] / 0.75)


def test_one_question_without_an_answer_makes_it_agreement() -> None:
    records = [made_record("1", "p", "a", [True]), made_record("2", "q", "b", [False], answered=False)]
    document = curves_of_records(records, 1)
    assert document["measure"] == "agreement"
    assert document["full"]["accuracy"] is None
    assert document["removal"][0]["agreement"] == 0.5
    assert document["removal"][0]["low"] == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read the trace"),
        ("{", "is not JSON"),
        ("[1]", "is no trace"),
        ('{"schema_version": 1, "rows": []}', "is no trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_document(path)
