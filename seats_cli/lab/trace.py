"""What is left of an answer when tokens are missing, measured for one question after the other.

Each question is read once with all tokens and the model's own answer behind it, and every layer's output is
kept. A point of a curve then starts from the output of the layer before its cut (`prefill`'s first_layer), so
that no layer before a cut is run again. Since the answer stands in the sequence, one pass gives the
probability of each of its tokens, which attend in every layer to what that layer processed, as they do when
decoding with the layerwise cache (docs/method.md, "Decoding").
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import exp, isfinite
from pathlib import Path
from typing import Any

import torch

from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import DecodeOptions, Generation, TextStream
from seats_cli.engine.encode import encode
from seats_cli.engine.memory import explained_memory
from seats_cli.engine.prefill import Prefilled, prefill
from seats_cli.errors import MediaError, SeatsError
from seats_cli.lab.manifest import Sample
from seats_cli.lab.records import Record, failure
from seats_cli.lab.scoring import score
from seats_cli.lab.settings import Setting
from seats_cli.lab.suite import rendered
from seats_cli.lab.sweep import ClipTask, Job
from seats_cli.lab.tracing import KINDS, Point, Tracing
from seats_cli.presets import Preset, Schedule
from seats_cli.selection.budget import keep_best
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.methods import METHODS
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Kind, Plan, keep_total
from seats_cli.selection.planning import KindPlan, assemble, full_plan, kinds_of
from seats_cli.session import AskOptions, ReadClip, Session, clip_counts

FULL_METHOD = METHODS["full"]
CODES: dict[str, tuple[int, ...]] = {"video": (VIDEO,), "audio": (AUDIO,), "both": (VIDEO, AUDIO)}


@dataclass(frozen=True)
class Outcome:
    """How the full-token answer fares at one point.

    agreement:      whether greedy decoding would write it, to the token that ends it
    log_likelihood: mean natural logarithm of the probability of each of its tokens, the end included
    probability:    of the whole answer, the end included
    correct, answer: where the manifest has answers, whether what greedy decoding writes is right, and its
        words where they are others
    """

    agreement: bool
    log_likelihood: float
    probability: float
    correct: bool | None
    answer: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without what does not apply."""
        found = {
            "agreement": self.agreement,
            "log_likelihood": float(f"{self.log_likelihood:.6g}"),
            "probability": float(f"{self.probability:.6g}"),
            "correct": self.correct,
        }
        return found if self.answer is None else {**found, "answer": self.answer}


@dataclass(frozen=True)
class Target:
    """The full-token answer: what every point is measured against.

    ids:   its tokens without the end
    ended: whether it ended by itself; else at the limit, and no end is measured
    """

    ids: tuple[int, ...]
    ended: bool
    text: str

    @property
    def fed(self) -> tuple[int, ...]:
        """The tokens that stand behind the prompt: all that something is predicted from."""
        return self.ids if self.ended else self.ids[:-1]


@dataclass(frozen=True)
class Reading:
    """A question read with all tokens, the answer behind it.

    layout:   of the S prompt tokens and the answer's, on the device
    n_prompt: S
    outputs:  (S + answer, D) of each layer, that of no layer (the embeddings) first
    cache:    of all layers
    """

    session: Session
    clip: ReadClip
    sample: Sample
    options: AskOptions
    preset: Preset
    selection: SelectionOptions
    counts: ClipCounts
    target: Target
    layout: TokenLayout
    n_prompt: int
    next_position: int
    outputs: tuple[torch.Tensor, ...]
    cache: LayerCache

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that the clip has."""
        counted: tuple[tuple[Kind, int], ...] = (
            ("video", self.counts.n_video),
            ("audio", self.counts.n_audio),
        )
        return tuple(kind for kind, n in counted if n)

    @property
    def removable(self) -> tuple[str, ...]:
        """What is measured: each kind alone and both; of a clip with one kind, just that."""
        return KINDS if len(self.kinds) > 1 else self.kinds


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


# ---- with all tokens --------------------------------------------------------------------------------------


def read_with_answer(
    session: Session, clip: ReadClip, sample: Sample, options: AskOptions
) -> tuple[Reading, Outcome]:
    """Answer with all tokens, then read prompt and answer once more, keeping every layer's output.

    Raises MediaError for a clip without video and audio tokens, PlanError where the prompt does not fit.
    """
    adapter, setup = session.adapter, session.setup(options)
    prompt = adapter.prompt(sample.question, clip.shape, system=options.system)
    adapter.check_context(prompt, len(prompt), max_new_tokens=options.max_new_tokens)
    counts = clip_counts(prompt, clip.shape)
    if not counts.n_video + counts.n_audio:
        raise MediaError(f"{clip.media} has neither video nor audio, and nothing else is ever removed")
    plan = full_plan(FULL_METHOD.name, setup.preset, counts, setup.options)
    given = encode(adapter, FULL_METHOD, plan, clip.encoded, prompt, clip.shape)
    first = prefill(adapter, FULL_METHOD, plan, given.embeddings, given.layout)
    generation = Generation(adapter, first, prompt.next_position, options.decoding)
    text = "".join(generation)
    target = Target(tuple(generation.token_ids), generation.finish_reason == "stop", text)
    del first, generation
    rows, layout = with_answer(session, given.embeddings, given.layout, target.fed, prompt.next_position)
    outputs = [rows]
    read = prefill(
        adapter, FULL_METHOD, plan, rows, layout, on_output=lambda _, hidden: outputs.append(hidden[0])
    )
    reading = Reading(
        session, clip, sample, options, setup.preset, setup.options, counts, target, layout, len(prompt),
        prompt.next_position, tuple(outputs), read.cache,
    )  # fmt: skip
    return reading, outcome(reading, read, outputs[-1])


def with_answer(
    session: Session, rows: torch.Tensor, layout: TokenLayout, ids: Sequence[int], next_position: int
) -> tuple[torch.Tensor, TokenLayout]:
    """Embeddings (S, D) and their layout with the answer's tokens behind them, as text."""
    if not ids:
        return rows, layout
    n, device = len(ids), layout.kind.device
    adapter = session.adapter
    answer = adapter.embed_text(torch.tensor(ids, device=adapter.device)).to(rows)
    text, video, audio = layout.counts
    whole = TokenLayout(
        torch.cat((layout.kind, layout.kind.new_full((n,), TEXT))),
        torch.cat((layout.window, layout.window.new_full((n,), -1))),
        torch.cat((layout.position, (next_position + torch.arange(n, device=device)).expand(3, -1)), dim=1),
        torch.cat((layout.time_s, layout.time_s.new_zeros(n))),
        (text + n, video, audio),
    )
    return torch.cat((rows, answer)), whole


def outcome(reading: Reading, read: Prefilled, hidden: torch.Tensor) -> Outcome:
    """How the answer fares after a pass whose last layer put out `hidden` (N, D), the answer's rows last."""
    adapter, target = reading.session.adapter, reading.target
    logits = answer_logits(reading, hidden)
    ends = torch.tensor(sorted(adapter.eos_token_ids), device=logits.device)
    expected = torch.tensor(target.ids, dtype=torch.int64, device=logits.device)
    likely = logits.log_softmax(-1)
    known = likely[: len(expected)].gather(1, expected[:, None])[:, 0]
    if target.ended:
        known = torch.cat((known, likely[-1, ends].logsumexp(0)[None]))
    said, known_list = logits.argmax(-1).tolist(), known.tolist()
    as_wanted = [
        token == target.ids[row] if row < len(target.ids) else token in adapter.eos_token_ids
        for row, token in enumerate(said)
    ]
    total = sum(known_list)
    if not isfinite(total):
        raise SeatsError("the model's probabilities are no numbers", hint="try --dtype float32")
    agrees = all(as_wanted)
    correct, answer = None, None
    if reading.sample.answers:
        if not agrees:
            answer = greedy_from(reading, read, logits, as_wanted.index(False))
        correct = score(reading.sample, target.text if answer is None else answer).correct
    return Outcome(agrees, total / len(said), exp(total), correct, answer)


def answer_logits(reading: Reading, hidden: torch.Tensor) -> torch.Tensor:
    """(tokens to predict, V) float32, from the prompt's last token on, of a last layer's output (N, D)."""
    n_rows = len(reading.target.fed) + 1
    return reading.session.adapter.final_logits(hidden[None, -n_rows:])[0].float()


def greedy_from(reading: Reading, read: Prefilled, logits: torch.Tensor, row: int) -> str:
    """The words of greedy decoding, which leaves the full-token answer at its token `row`."""
    fed = reading.target.fed
    before = replace(read, logits=logits[row], cache=read.cache.fork(drop_last=len(fed) - row))
    decoding = DecodeOptions(max_new_tokens=reading.options.max_new_tokens - row)
    generation = Generation(reading.session.adapter, before, reading.next_position + row, decoding)
    for _ in generation:
        pass
    stream = TextStream(reading.session.adapter.tokenizer)
    pieces = [stream.push(token) for token in (*fed[:row], *generation.token_ids)]
    return "".join((*pieces, stream.finish()))


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
    """After each layer the best of each kind by the last text token's attention: stage II of one window."""
    layout, n_layers = reading.layout, reading.session.adapter.n_layers
    text, video, audio = layout.counts
    group = layout.kind.to(torch.int64)
    for layer in tracing.choice_layers(n_layers):
        answer = layout.time_s.new_zeros(len(layout) - reading.n_prompt)  # its tokens are text: all stay
        scores = torch.cat((prompt_attention(reading, layer).to(group.device), answer))
        for kind in reading.removable:
            for share in tracing.keeps:
                n_video = keep_total(share, video) if VIDEO in CODES[kind] else video
                n_audio = keep_total(share, audio) if AUDIO in CODES[kind] else audio
                quota = torch.tensor((text, n_video, n_audio), device=group.device)
                keep = keep_best(scores, group, quota).nonzero().squeeze(1)
                at = {"kind": kind, "after_layer": layer, "keep": share}
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
            yield {"kind": kind, "entry": share}, run_on(reading, rows, layout, 0)


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
    return run_on(reading, rows, reading.layout.subset(keep, counts), layer)


def run_on(reading: Reading, rows: torch.Tensor, layout: TokenLayout, layer: int) -> Outcome:
    """Run `rows` through the layers after `layer`, which have the cache of the whole sequence before them."""
    plan = full_plan(FULL_METHOD.name, reading.preset, reading.counts, reading.selection)
    last = rows

    def remember(_: int, hidden: torch.Tensor) -> None:
        nonlocal last
        last = hidden[0]

    read = prefill(
        reading.session.adapter, FULL_METHOD, plan, rows, layout,
        cache=reading.cache.fork(layer), first_layer=layer + 1, on_output=remember,
    )  # fmt: skip
    return outcome(reading, read, last)
