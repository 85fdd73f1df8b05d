"""The answer: one token at a time from the cache, as text that is never cut inside a character."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from seats_cli.engine.graph import GraphDecoder
from seats_cli.engine.prefill import Prefilled
from seats_cli.errors import UsageError
from seats_cli.measure.clock import FIRST_TOKEN, Stopwatch
from seats_cli.model.adapter import Adapter

FinishReason = Literal["stop", "length"]
REPLACEMENT = "\ufffd"  # what a tokenizer's decoder shows for bytes that are no character (yet)


@dataclass(frozen=True)
class DecodeOptions:
    """How the next token is chosen and when to stop.

    max_new_tokens: at least 1
    temperature:    0 takes the likeliest token; above, logits are divided by it and one is drawn
    top_p:          in (0, 1]; draw only among the likeliest tokens whose probabilities reach this sum
    seed:           of the draw; the same seed on the same device gives the same answer
    ignore_end:     go on to max_new_tokens whatever the model says: a benchmark compares equal lengths
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_end: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.top_p}")


class TokenSampler:
    """Chooses token ids from logits, reproducibly."""

    def __init__(self, options: DecodeOptions, device: torch.device) -> None:
        self._options = options
        self._generator = torch.Generator(device).manual_seed(options.seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The id (1,) int64 chosen from (V,) float32 logits on this sampler's device; does not wait."""
        if self._options.temperature == 0.0:
            return logits.argmax(keepdim=True)
        # Subtracting the maximum first keeps tiny temperatures finite.
        scaled = (logits - logits.max()) / self._options.temperature
        probability, token = scaled.softmax(-1).sort(descending=True, stable=True)
        # A token stays while the sum before it is short of top_p, so the likeliest always does.
        outside = probability.cumsum(-1) - probability >= self._options.top_p
        outside[:1].fill_(False)
        drawn = torch.multinomial(probability.masked_fill(outside, 0.0), 1, generator=self._generator)
        return token[drawn]


class TextStream:
    """Turns token ids into text pieces that join to the decoded whole.

    A byte-level token may end inside a character, which decodes to U+FFFD; such text is held back until the
    rest has come. Tokens are decoded together with the last ones before them, because a word's leading space
    depends on its neighbour, and only what is new is returned.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: anything with transformers' `decode(ids, skip_special_tokens=...)`."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # where decoding starts
        self._shown = 0  # tokens whose text is out

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often "", never half a character."""
        self._ids.append(token_id)
        new = self._new_text()
        if not new or new.endswith(REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return new

    def finish(self) -> str:
        """What was still held back, less a last character that never became whole."""
        new = self._new_text().rstrip(REPLACEMENT)
        self._context = self._shown = len(self._ids)
        return new

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return _decoded(self._tokenizer, ids)


def text_of(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """What the pieces of a `TextStream` join to, at once: all text, less a last character that never became
    whole."""
    return _decoded(tokenizer, token_ids).rstrip(REPLACEMENT)


def _decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    # Cleaning up spaces would change text that is already out.
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Generation:
    """One answer in the making: iterate over it for text pieces, then read how it ended.

    token_ids:     what was generated, without the token that ended the answer
    text:          the pieces so far, joined
    finish_reason: "stop" for an end token, "length" for max_new_tokens; None while it runs
    """

    def __init__(
        self,
        adapter: Adapter,
        prefilled: Prefilled,
        next_position: float,
        options: DecodeOptions,
        *,
        clock: Stopwatch | None = None,
        graph: GraphDecoder | None = None,
    ) -> None:
        """`next_position`: rotary position of the first generated token, as the whole prompt has it
        (`Prompt.next_position`): positions go on from there whatever was dropped.
        `clock` gets the mark FIRST_TOKEN; `graph`, where there is one, takes over the prefill's cache and
        runs the steps."""
        self._adapter = adapter
        self._prefilled = prefilled
        self._next_position = next_position
        self._options = options
        self._clock = clock
        self._graph = graph
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def __iter__(self) -> Iterator[str]:
        """Text pieces, none empty, as they become certain. Can be run once: the cache is used up by it."""
        stream = TextStream(self._adapter.tokenizer)
        for token_id in self._tokens():
            piece = stream.push(token_id)
            if piece:
                self.text += piece
                yield piece
        piece = stream.finish()
        if piece:
            self.text += piece
            yield piece

    def _tokens(self) -> Iterator[int]:
        """Token ids up to the end token or the limit.

        On CUDA the step after a token is launched before the token is read, so the device never waits for the
        host; the step behind the last token is then for nothing.
        """
        logits, limit = self._prefilled.logits, self._options.max_new_tokens
        choose = TokenSampler(self._options, logits.device)
        advance = self._advance(limit)
        ahead = logits.device.type == "cuda"
        token = choose(logits)
        for step in range(limit):
            arrived = sent_to_host(token)
            following = None
            if ahead and step + 1 < limit:
                following = choose(advance(token, step))
            (token_id,) = arrived()
            if self._clock is not None and step == 0:
                self._clock.mark(FIRST_TOKEN)
            if token_id in self._adapter.eos_token_ids and not self._options.ignore_end:
                self.finish_reason = "stop"
                return
            self.token_ids.append(token_id)
            if step + 1 == limit:
                self.finish_reason = "length"
            yield token_id
            if step + 1 < limit:
                token = choose(advance(token, step)) if following is None else following

    def _advance(self, limit: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """One step: (token (1,), steps before it) to the logits (V,) of the next."""
        adapter, cache = self._adapter, self._prefilled.cache
        if self._graph is None:
            return lambda token, step: decode_step(adapter, token, self._next_position + step, cache)
        graph = self._graph
        graph.begin(cache, self._next_position, limit)
        return lambda token, _: graph.step(token)[0]


def sent_to_host(tokens: torch.Tensor, *, idle: bool = False) -> Callable[[], list[int]]:
    """Start copying tokens (B,) int64 to the host; the result waits for them, and for nothing after them.

    idle: the core is left to others meanwhile, and taken back some microseconds late; else it is kept busy
    """
    if not tokens.is_cuda:
        there: list[int] = tokens.tolist()
        return lambda: there
    on_host = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=True)
    on_host.copy_(tokens, non_blocking=True)
    copied = torch.cuda.Event(blocking=idle)
    copied.record(torch.cuda.current_stream(tokens.device))

    def wait() -> list[int]:
        copied.synchronize()
        here: list[int] = on_host.tolist()
        return here

    return wait


def decode_step(adapter: Adapter, token: torch.Tensor | int, position: float, cache: Any) -> torch.Tensor:
    """Logits (V,) float32 after one more token, (1,) int64 or its number, at `position` (on all three axes);
    grows the cache."""
    ids = token if isinstance(token, torch.Tensor) else torch.tensor([token], device=adapter.device)
    hidden = adapter.embed_text(ids)[None]
    rotary = adapter.rotary(torch.full((3, 1), position, dtype=adapter.position_dtype, device=adapter.device))
    for index in range(adapter.n_layers):
        hidden = adapter.run_layer(index, hidden, rotary, cache)
    return adapter.final_logits(hidden, last_only=True)[0, -1].float()


def answer_log_likelihood(
    adapter: Adapter, prefilled: Prefilled, next_position: float, answer_ids: Sequence[int]
) -> float:
    """The mean natural log-probability of given tokens and of the end behind them, one decode step each.

    The end counts as any of the end tokens. Uses up the prefill's cache.
    """
    logits, total = prefilled.logits, 0.0
    for step, token_id in enumerate(answer_ids):
        total += float(logits.log_softmax(-1)[token_id])
        logits = decode_step(adapter, token_id, next_position + step, prefilled.cache)
    ends = torch.tensor(sorted(adapter.eos_token_ids), device=logits.device)
    return (total + float(logits.log_softmax(-1)[ends].logsumexp(0))) / (len(answer_ids) + 1)
