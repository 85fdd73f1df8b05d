"""A question read with all tokens, its answer behind it, and how that answer fares when less is read.

Every layer's output is kept. Since the answer stands in the sequence, one pass gives the probability of each
of its tokens, which attend in every layer to what that layer processed, as they do when decoding with the
layerwise cache (docs/method.md, "Decoding"). `trace.py` asks what is left when tokens are missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite
from typing import Any

import torch

from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import DecodeOptions, Generation, TextStream
from seats_cli.engine.encode import encode
from seats_cli.engine.prefill import Prefilled, prefill
from seats_cli.errors import MediaError, SeatsError
from seats_cli.lab.manifest import Sample
from seats_cli.lab.scoring import score
from seats_cli.lab.tracing import KINDS
from seats_cli.presets import Preset
from seats_cli.selection.layout import TEXT, TokenLayout
from seats_cli.selection.methods import METHODS
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Kind
from seats_cli.selection.planning import full_plan
from seats_cli.session import AskOptions, ReadClip, Session, clip_counts

FULL_METHOD = METHODS["full"]


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
    deepstack: (E, S + answer, D) that was added behind the first layers; None where nothing was
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
    next_position: float
    outputs: tuple[torch.Tensor, ...]
    cache: LayerCache
    deepstack: torch.Tensor | None = None

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
    first = prefill(adapter, FULL_METHOD, plan, given.embeddings, given.layout, deepstack=given.deepstack)
    generation = Generation(adapter, first, prompt.next_position, options.decoding)
    text = "".join(generation)
    target = Target(tuple(generation.token_ids), generation.finish_reason == "stop", text)
    del first, generation
    rows, layout = with_answer(session, given.embeddings, given.layout, target.fed, prompt.next_position)
    features = answered_deepstack(given.deepstack, len(layout))
    outputs = [rows]
    read = prefill(
        adapter, FULL_METHOD, plan, rows, layout, deepstack=features,
        on_output=lambda _, hidden: outputs.append(hidden[0]),
    )  # fmt: skip
    reading = Reading(
        session, clip, sample, options, setup.preset, setup.options, counts, target, layout, len(prompt),
        prompt.next_position, tuple(outputs), read.cache, features,
    )  # fmt: skip
    return reading, outcome(reading, read, outputs[-1])


def with_answer(
    session: Session, rows: torch.Tensor, layout: TokenLayout, ids: Sequence[int], next_position: float
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


def answered_deepstack(deepstack: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """Features (E, S, D) with zeros behind them for an answer's tokens, n in all."""
    if deepstack is None:
        return None
    return torch.nn.functional.pad(deepstack, (0, 0, 0, n - deepstack.shape[1]))


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
