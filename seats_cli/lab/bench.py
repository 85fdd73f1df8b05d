"""The benchmark: every row in turn, round after round, so that what disturbs the machine disturbs all alike.

A group is one input (one length of a sweep, or one file). Within it `full` comes first, then each method at
each ratio; round r runs every row once. Rounds before the first count for nothing. The stock path, where it
is asked for, is measured before all else, on a network that nothing has altered.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TypeVar

import torch

from seats_cli.engine.memory import explained_memory
from seats_cli.errors import SeatsError, UsageError, unexpected
from seats_cli.lab.bench_input import Item
from seats_cli.lab.bench_runs import Now, RunResult, StockItem, count_flops, run_row, setup_of
from seats_cli.lab.settings import FULL, Setting
from seats_cli.session import ModelOptions, Session

T = TypeVar("T")
SEATS, STOCK = "seats", "transformers"
WHOLE = Setting(FULL, 1.0)
FAST_PATHS = ("compile", "graphs")  # fields of ModelOptions that turn fast paths on, where there are such


@dataclass(frozen=True)
class BenchOptions:
    """How often, how much, and what besides.

    against_stock: whether transformers' own path is timed as well
    check_flops:   whether PyTorch counts each row's prefill too, once, outside the timing
    """

    repeats: int = 5
    warmup: int = 1
    new_tokens: int = 16
    against_stock: bool = False
    check_flops: bool = False


@dataclass
class Row:
    """One row while it is measured.

    item:       place of its input among the benchmark's
    engine:     "seats", or "transformers" for the stock path
    runs:       (round, place in the order of all timed runs, what was measured)
    peak_bytes: of device memory in the row's first run, into which no other row's buffers were carried
    counted:    multiply-adds of the prefill, as PyTorch counted them and as the formulas say
    error:      why it has no (further) runs
    """

    item: int
    engine: str
    setting: Setting
    runs: list[tuple[int, int, RunResult]] = field(default_factory=list)
    peak_bytes: int | None = None
    counted: tuple[int, int] | None = None
    error: SeatsError | None = None


@dataclass
class Bench:
    """What was measured so far; it grows while the benchmark runs."""

    items: Sequence[Item]
    rows: list[Row] = field(default_factory=list)
    order: int = 0
    complete: bool = False


@dataclass(frozen=True)
class Watcher:
    """Who is told: `progress(done, total)` of all runs, `failed(row)` once a row, `at(item)` what begins."""

    progress: Callable[[int, int], None] = lambda *_: None
    failed: Callable[[Row], None] = lambda _: None
    at: Callable[[Item], None] = lambda _: None


def unaltered(options: ModelOptions) -> ModelOptions:
    """The same model with every fast path off, for the stock rows."""
    off = {item.name: False for item in fields(options) if item.name in FAST_PATHS}
    return replace(options, **off)  # type: ignore[arg-type]  # all of FAST_PATHS are flags


def measure(
    bench: Bench,
    open_session: Callable[[ModelOptions], Session],
    model: ModelOptions,
    settings: Sequence[Setting],
    options: BenchOptions,
    watcher: Watcher | None = None,
    *,
    now: Now = time.perf_counter,
) -> Session:
    """Fill `bench` with rows. What does not fit becomes a row's error and ends nothing; an interruption
    leaves what is there. Returns the session that ran ours, for what it says of itself."""
    told = watcher or Watcher()
    rounds = options.warmup + options.repeats
    per_item = (len(settings) + options.against_stock) * rounds
    counter = _Counter(len(bench.items) * per_item, told)
    plain = unaltered(model)
    session = open_session(plain if options.against_stock else model)
    if options.against_stock:
        for place, item in enumerate(bench.items):
            told.at(item)
            measure_stock(bench, session, place, item, options, counter, now)
        if plain != model:
            del session  # its weights make room for the altered ones
            give_back_memory()
            session = open_session(model)
    for place, item in enumerate(bench.items):
        told.at(item)
        measure_rows(bench, session, place, item, settings, options, counter, now)
        item.release()
    bench.complete = True
    return session


def give_back_memory() -> None:
    """Hand unused device memory back: loading asks the driver, which takes what is cached for taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_stock(
    bench: Bench,
    session: Session,
    place: int,
    item: Item,
    options: BenchOptions,
    counter: "_Counter",
    now: Now,
) -> None:
    """The stock path on one input."""
    row = Row(place, STOCK, WHOLE)
    bench.rows.append(row)
    item.prepare(session.adapter, setup_of(session, WHOLE).preset)
    stock = _tried(row, partial(StockItem, session, item, WHOLE), counter)
    for number in range(-options.warmup, options.repeats):
        if stock is not None and row.error is None:
            found = _tried(row, partial(stock.time, options.new_tokens, now=now), counter)
            _keep(bench, row, number, found)
        counter.step()


def measure_rows(
    bench: Bench,
    session: Session,
    place: int,
    item: Item,
    settings: Sequence[Setting],
    options: BenchOptions,
    counter: "_Counter",
    now: Now,
) -> None:
    """Ours on one input: round by round, each row once a round."""
    rows = [Row(place, SEATS, setting) for setting in settings]
    bench.rows += rows
    item.prepare(session.adapter, setup_of(session, settings[0]).preset)
    for number in range(-options.warmup, options.repeats):
        for row in rows:
            if row.error is None:
                if number == -options.warmup:
                    session.release()
                run = partial(run_row, session, item, row.setting, options.new_tokens, now=now)
                found = _tried(row, run, counter)
                _keep(bench, row, number, found)
            counter.step()
    for row in rows:
        if options.check_flops and row.error is None:
            row.counted = _tried(row, partial(count_flops, session, item, row.setting), counter)


def _keep(bench: Bench, row: Row, number: int, found: RunResult | None) -> None:
    if found is not None and row.peak_bytes is None:
        row.peak_bytes = found.peak_bytes
    if found is not None and number >= 0:
        row.runs.append((number, bench.order, found))
        bench.order += 1


def _tried(row: Row, work: Callable[[], T], counter: "_Counter") -> T | None:
    """What `work` gives; None where it cannot be, with the reason in the row. Raises UsageError: no other
    input would help."""
    try:
        with torch.inference_mode(), explained_memory():
            return work()
    except UsageError:
        raise
    except SeatsError as error:
        row.error = error
    except (torch.OutOfMemoryError, MemoryError) as error:
        row.error = unexpected(error)
    counter.told.failed(row)
    return None


class _Counter:
    """How many runs are done, of how many."""

    def __init__(self, total: int, told: Watcher) -> None:
        self.done, self.total, self.told = 0, total, told
        told.progress(0, total)

    def step(self) -> None:
        self.done += 1
        self.told.progress(self.done, self.total)
