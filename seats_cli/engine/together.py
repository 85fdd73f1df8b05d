"""Several answers decoded together: each joins when its prompt has been read, and leaves when it ends.

Reading the weights is what a decoded token costs, whether one sequence or eight wait for it. A step runs
every sequence that is open; nobody waits for the longest answer (continuous batching).
"""

from dataclasses import dataclass, field

import torch

from seats_cli.engine.decode import DecodeOptions, FinishReason, TokenSampler, sent_to_host, text_of
from seats_cli.engine.graph import GraphDecoder
from seats_cli.engine.prefill import Prefilled
from seats_cli.measure.clock import idle_until_done
from seats_cli.model.adapter import Adapter


@dataclass
class Sequence:
    """One answer in the making.

    token_ids:     what was generated so far, without the token that ended the answer
    text:          the same as words, once it has ended
    finish_reason: "stop" for an end token, "length" for max_new_tokens; None while it runs
    """

    options: DecodeOptions
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclass
class _Slot:
    sequence: Sequence
    choose: TokenSampler
    chosen: int = 1  # tokens that the device has chosen; the host has read one less, or all


class DecodeTogether:
    """Open sequences on one decoder, as many as it has slots.

    A token is read while the step behind it runs, so on CUDA the device never waits for the host; the step
    behind an answer's end is then for nothing. What a sequence says does not depend on the others.
    """

    def __init__(self, adapter: Adapter, decoder: GraphDecoder) -> None:
        self._adapter, self._decoder = adapter, decoder
        self._open: dict[int, _Slot] = {}
        self._tokens = torch.zeros(decoder.slots, dtype=torch.int64, device=adapter.device)
        self._spent: list[torch.Tensor] = []  # caches that are copied from, made on other streams

    def __len__(self) -> int:
        return len(self._open)

    @property
    def free(self) -> int:
        """Sequences that can be added now."""
        return self._decoder.slots - len(self._open)

    def add(
        self,
        prefilled: Prefilled,
        next_position: float,
        options: DecodeOptions,
        *,
        other_stream: bool = False,
    ) -> Sequence:
        """Open a sequence behind a read prompt, whose cache is used up; `next_position` as `Generation` has
        it. Raises ValueError where no slot is free.

        other_stream: the cache was made on another stream than this thread's, and is there. Its memory is
                      kept until the next step, when it was copied from.
        """
        if not self.free:
            raise ValueError(f"all {self._decoder.slots} slots are taken")
        slot = min(set(range(self._decoder.slots)) - set(self._open))
        spent = list(prefilled.cache.tensors()) if other_stream else []
        try:
            self._decoder.begin(prefilled.cache, next_position, options.max_new_tokens, slot)
            choose = TokenSampler(options, prefilled.logits.device)
            self._tokens[slot] = choose(prefilled.logits)[0]
        except BaseException:
            self._decoder.retire(slot)  # half begun, it would run on
            if spent:  # perhaps it is copied from
                idle_until_done(self._adapter.device)
            raise
        self._spent += spent
        sequence = Sequence(options)
        self._open[slot] = _Slot(sequence, choose)
        return sequence

    def step(self) -> list[Sequence]:
        """One more token of every open sequence; returns those that ended with it, which are closed."""
        read_now = dict(self._open)
        arrived = sent_to_host(self._tokens, idle=True)  # the next step is running when they are waited for
        for number, slot in read_now.items():
            if slot.chosen == slot.sequence.options.max_new_tokens:
                self._close(number)  # nothing follows its last token
        if self._open:
            self._choose(self._decoder.step(self._tokens))
        tokens, ended = arrived(), []
        self._spent.clear()  # what came before these tokens is done
        for number, slot in read_now.items():
            self._read(slot, tokens[number])
            if slot.sequence.finish_reason is not None:
                if number in self._open:
                    self._close(number)
                ended.append(slot.sequence)
        return ended

    def clear(self) -> None:
        """Close every sequence where it is."""
        for number in list(self._open):
            self._close(number)
        if self._spent:
            idle_until_done(self._adapter.device)
            self._spent.clear()

    def _choose(self, logits: torch.Tensor) -> None:
        for slot in self._open.values():
            slot.chosen += 1
        tokens = logits.argmax(dim=-1)
        for number, slot in self._open.items():
            if slot.sequence.options.temperature > 0.0:
                tokens[number] = slot.choose(logits[number])[0]
        self._tokens = tokens

    def _read(self, slot: _Slot, token: int) -> None:
        sequence, limit = slot.sequence, slot.sequence.options.max_new_tokens
        if token in self._adapter.eos_token_ids and not sequence.options.ignore_end:
            sequence.finish_reason = "stop"
        else:
            sequence.token_ids.append(token)
            if len(sequence.token_ids) == limit:
                sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            sequence.text = text_of(self._adapter.tokenizer, sequence.token_ids)

    def _close(self, number: int) -> None:
        self._decoder.retire(number)
        del self._open[number]
