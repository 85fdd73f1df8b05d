"""What is left of an answer when tokens are missing, measured for one question after the other.

Each question is read once with all tokens (`reading.py`). A point of a curve then starts from the output of
the layer before its cut (`prefill`'s first_layer), so that no layer before a cut is run again.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from seats_cli.engine.encode import encode
from seats_cli.engine.memory import explained_memory
from seats_cli.engine.prefill import prefill
from seats_cli.lab.manifest import Sample
from seats_cli.lab.reading import (
    FULL_METHOD,
    Outcome,
    Reading,
    answered_deepstack,
    outcome,
    read_with_answer,
    with_answer,
)
from seats_cli.lab.records import Record, failure
from seats_cli.lab.settings import Setting
from seats_cli.lab.suite import rendered
from seats_cli.lab.sweep import ClipTask, Job
from seats_cli.lab.tracing import Point, Tracing
from seats_cli.presets import Schedule
from seats_cli.selection.budget import keep_best
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.methods import METHODS
from seats_cli.selection.plan import Kind, Plan, keep_total
from seats_cli.selection.planning import KindPlan, assemble, full_plan, kinds_of
from seats_cli.session import ReadClip, Session

CODES: dict[str, tuple[int, ...]] = {"video": (VIDEO,), "audio": (AUDIO,), "both": (VIDEO, AUDIO)}


# ---- a clip -----------------------------------------------------------------------------------------------


def trace_clip(
    session: Session,
    task: ClipTask,
    jobs: Sequence[Job],
    setting: Setting,
    tracing: Tracing,
    folder: Path | None = None,
) -> Iterator[tuple[Job, Record]]:
    """The records of these jobs, whose clip is decoded and encoded once.

    What fails becomes a record that says so. folder: where a clip that must be rendered lies meanwhile.
    """
    left = list(jobs)
    first = task.samples[jobs[0][0]]
    file: AbstractContextManager[Path] = (
        nullcontext(first.media) if task.made is None else rendered(task.made, folder)
    )
    try:
        with file as media:
            clip = session.read(media, tracing.options(setting, first))
            for job in jobs:
                sample = task.samples[job[0]]
                try:
                    record = trace_sample(session, clip, sample, setting, tracing)
                except Exception as error:
                    record = failure(sample, setting, error)
                left.remove(job)
                yield job, record
    except Exception as error:  # it cannot be rendered or read
        for job in left:
            yield job, failure(task.samples[job[0]], setting, error)


def trace_sample(
    session: Session, clip: ReadClip, sample: Sample, setting: Setting, tracing: Tracing
) -> Record:
    """One question's record: the full-token answer and its outcome at every point of every curve."""
    started = time.perf_counter()
    with torch.inference_mode(), explained_memory():
        reading, full = read_with_answer(session, clip, sample, tracing.options(setting, sample))
        curves: dict[str, list[dict[str, Any]]] = {name: [] for name in tracing.curves}
        if "removal" in curves:
            curves["removal"] = plain(reading, removal(reading, full, tracing))
        if "choice" in curves:
            curves["choice"] = plain(reading, choice(reading, tracing))
        if "entry" in curves:
            curves["entry"] = [{**at, **found.to_json()} for at, found in entry(reading, tracing)]
        if "attention" in curves:
            curves["attention"] = attention(reading)
    counts = reading.counts
    return {
        "id": sample.id,
        "clip": sample.clip,
        "family": sample.family,
        "question": sample.question,
        "expected": list(sample.answers),
        "answer": reading.target.text,
        "method": setting.method,
        "ratio": setting.ratio,
        "preset": setting.preset,
        "settings": dict(setting.settings),
        "tokens": {
            "text": counts.n_text,
            "video": counts.n_video,
            "audio": counts.n_audio,
            "generated": len(reading.target.ids),
        },
        "full": full.to_json(),
        **curves,
        "seconds": round(time.perf_counter() - started, 3),
        "error": None,
    }


def plain(reading: Reading, points: Iterable[tuple[Point, Outcome]]) -> list[dict[str, Any]]:
    """Points as a record has them. Where a clip has one kind, both are that kind."""
    rows = [{**at, **found.to_json()} for at, found in points]
    return rows if len(reading.kinds) > 1 else [*rows, *({**row, "kind": "both"} for row in rows)]


# ---- the curves -------------------------------------------------------------------------------------------


def removal(reading: Reading, full: Outcome, tracing: Tracing) -> Iterator[tuple[Point, Outcome]]:
    """Each kind gone from each layer on; from the layer behind the last on, nothing is."""
    n_layers = reading.session.adapter.n_layers
    for kind in reading.removable:
        gone = torch.zeros_like(reading.layout.kind, dtype=torch.bool)
        for code in CODES[kind]:
            gone |= reading.layout.kind == code
        keep = (~gone).nonzero().squeeze(1)
        text, video, audio = reading.layout.counts
        counts = (text, 0 if VIDEO in CODES[kind] else video, 0 if AUDIO in CODES[kind] else audio)
        for layer in tracing.removal_layers(n_layers):
            yield {"kind": kind, "layer": layer}, after_cut(reading, layer - 1, keep, counts)
        yield {"kind": kind, "layer": n_layers + 1}, full


def choice(reading: Reading, tracing: Tracing) -> Iterator[tuple[Point, Outcome]]:
    """After each layer the best of all that the clip has, by the last text token's attention: stage II of one
    window. Nothing is made of each kind's own curve, which would cost as much again."""
    layout, n_layers = reading.layout, reading.session.adapter.n_layers
    text, video, audio = layout.counts
    group = layout.kind.to(torch.int64)
    for layer in tracing.choice_layers(n_layers):
        answer = layout.time_s.new_zeros(len(layout) - reading.n_prompt)  # its tokens are text: all stay
        scores = torch.cat((prompt_attention(reading, layer).to(group.device), answer))
        for share in tracing.keeps:
            n_video, n_audio = keep_total(share, video), keep_total(share, audio)
            quota = torch.tensor((text, n_video, n_audio), device=group.device)
            keep = keep_best(scores, group, quota).nonzero().squeeze(1)
            at = {"kind": reading.removable[-1], "after_layer": layer, "keep": share}
            yield at, after_cut(reading, layer, keep, (text, n_video, n_audio))


def entry(reading: Reading, tracing: Tracing) -> Iterator[tuple[Point, Outcome]]:
    """Stage I's choice of one kind, the other kind complete, nothing dropped later."""
    adapter, clip, seats = reading.session.adapter, reading.clip, METHODS["seats"]
    prompt = adapter.prompt(reading.sample.question, clip.shape, system=reading.options.system)
    for kind in reading.kinds:
        for share in tracing.entries:
            plan = entry_plan(reading, kind, share)
            given = encode(adapter, seats, plan, clip.encoded, prompt, clip.shape)
            rows, layout = with_answer(
                reading.session, given.embeddings, given.layout, reading.target.fed, reading.next_position
            )
            features = answered_deepstack(given.deepstack, len(layout))
            yield {"kind": kind, "entry": share}, run_on(reading, rows, layout, 0, features)


def entry_plan(reading: Reading, kind: Kind, share: float) -> Plan:
    """All that a plan of SEATS needs for its stage I to keep `share` of a kind, exact over the whole clip."""
    parts = []
    for name, tokens in zip(("video", "audio"), kinds_of(reading.preset, reading.counts), strict=True):
        mine = share if name == kind else 1.0
        parts.append(KindPlan(mine, mine, (), (tokens.entering_spread(mine),)))
    nothing = Schedule((), None, 1.0, reading.selection.tau)
    return assemble(
        "entry", reading.preset, share, reading.counts, reading.selection, nothing, (parts[0], parts[1]),
        needs_saliency=True, spread_entry=True,
    )  # fmt: skip


def attention(reading: Reading) -> list[dict[str, Any]]:
    """The last text token's attention mass on each kind, in every layer with all tokens."""
    kind = reading.layout.kind[: reading.n_prompt].to(torch.int64)
    found = []
    for layer in range(1, reading.session.adapter.n_layers + 1):
        scores = prompt_attention(reading, layer)
        mass = torch.zeros(3, device=scores.device).index_add_(0, kind.to(scores.device), scores).tolist()
        shares = {"video": mass[VIDEO], "audio": mass[AUDIO], "text": mass[TEXT]}
        found.append({"layer": layer, **{name: round(value, 6) for name, value in shares.items()}})
    return found


def prompt_attention(reading: Reading, layer: int) -> torch.Tensor:
    """(S,) float32: what the prompt's last token attends to on `layer`'s output (1-based), as in stage II."""
    n = reading.n_prompt
    rotary = reading.session.adapter.rotary(reading.layout.position[:, :n])
    return reading.session.adapter.last_token_attention(layer - 1, reading.outputs[layer][None, :n], rotary)


def after_cut(reading: Reading, layer: int, keep: torch.Tensor, counts: tuple[int, int, int]) -> Outcome:
    """The outcome when only `keep` (K,) int64 of the sequence goes on after `layer` (0: enters at all)."""
    hidden = reading.outputs[layer]
    rows = hidden.index_select(0, keep.to(hidden.device))
    features = reading.deepstack
    if features is not None:
        features = features.index_select(1, keep.to(features.device))
    return run_on(reading, rows, reading.layout.subset(keep, counts), layer, features)


def run_on(
    reading: Reading,
    rows: torch.Tensor,
    layout: TokenLayout,
    layer: int,
    deepstack: torch.Tensor | None,
) -> Outcome:
    """Run `rows` through the layers after `layer`, which have the cache of the whole sequence before them."""
    plan = full_plan(FULL_METHOD.name, reading.preset, reading.counts, reading.selection)
    last = rows

    def remember(_: int, hidden: torch.Tensor) -> None:
        nonlocal last
        last = hidden[0]

    read = prefill(
        reading.session.adapter, FULL_METHOD, plan, rows, layout,
        cache=reading.cache.fork(layer), first_layer=layer + 1, on_output=remember, deepstack=deepstack,
    )  # fmt: skip
    return outcome(reading, read, last)
