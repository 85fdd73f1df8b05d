"""Who answers on many GPUs and many hosts: Ray Data, with an actor for each model (extra `seats-cli[ray]`).

Clips are rows, in blocks; an actor runs the scheduler of run.py over a block. Records come back to this
process, which alone writes. A block whose actor dies loses what it had not given yet, and so do blocks that
wait for that actor. Those clips go out again, each in a block of its own, and what is missing still one after
the other, each with an actor to itself: what does not come back then is what actors die of, and is recorded
as failed. What fails without killing anybody is a record like others and is never tried again.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from itertools import chain
from typing import Any

from seats_cli import errors
from seats_cli.batch.crew import WorkerError
from seats_cli.batch.decoders import IN_THIS_PROCESS, Pace
from seats_cli.batch.reading import Clip, Listener
from seats_cli.batch.records import Asking, Record, failure
from seats_cli.batch.sources import Item
from seats_cli.batch.team import answered, described
from seats_cli.errors import SeatsError, UsageError

TRIES = 3  # of a clip that does not come back: in a block, in a block of its own, with an actor of its own
MOST_IN_A_BLOCK = 16  # clips: enough to read ahead within a block, few enough to be lost together
BLOCKS_PER_ACTOR = 4  # at least, so that the last ones finish together


class Answerer:
    """An actor: a session, and the records of the clips of each block, as they are finished."""

    def __init__(
        self, asking: Asking, folder: str, threads: int | None, pace: Pace = IN_THIS_PROCESS
    ) -> None:
        """`folder`: where the command was typed, for files that were named relative to it; `threads`: of
        PyTorch on the CPU, None to leave them alone."""
        import torch

        from seats_cli.session import Limits, ModelOptions, Session

        with suppress(OSError):  # another host may not have it; whole names do not need it
            os.chdir(folder)
        if threads is not None:
            torch.set_num_threads(threads)
        self._asking, self._pace = asking, pace
        self._problem: SeatsError | None = None
        try:
            self._session = Session(ModelOptions(**asking.model), limits=Limits(**asking.limits))
            described(self._session, asking)
        except SeatsError as error:  # raised here, it would come back as one of Ray's own
            self._problem = error

    def __call__(self, block: Mapping[str, Any]) -> Iterator[dict[str, list[str]]]:
        """Rows with a `clip` (JSON) each, to rows with a `record` (JSON) each."""
        if self._problem is not None:
            told = [type(self._problem).__name__, str(self._problem), self._problem.hint]
            yield {"record": [json.dumps({"problem": told})]}
            return
        clips = [tuple(Item(**item) for item in json.loads(text)) for text in block["clip"]]
        for record in answered(self._session, clips, self._asking, self._pace):
            yield {"record": [json.dumps(record)]}


class RayTeam:
    """A cluster that answers; a context manager, inside which it is up. Without an address, a cluster of this
    machine alone. `size`: how many actors there are, known inside.

    Whatever Ray prints to stdout meanwhile goes to stderr.
    """

    def __init__(
        self,
        asking: Asking,
        *,
        address: str | None = None,
        actors: int | None = None,
        pace: Pace = IN_THIS_PROCESS,
    ) -> None:
        """`actors`: one a GPU of the cluster where none is given, one on a cluster without GPUs; `pace`: of
        each.

        Raises UsageError where Ray is not installed."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of this run
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        self._ray = _imported()
        self._asking, self._address, self._actors, self._pace = asking, address, actors, pace
        self._redirected = redirect_stdout(sys.stderr)
        self._gpus = 0
        self._threads: int | None = None
        self.size = 0

    def __enter__(self) -> "RayTeam":
        """Raises UsageError where the address does not answer."""
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._redirected.__enter__()
        try:
            self._ray.init(
                address=self._address or "local", log_to_driver=False, logging_level=logging.CRITICAL
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            self._redirected.__exit__(None, None, None)
            raise UsageError(
                f"no Ray cluster answers at {self._address or 'this machine'}: {str(error).splitlines()[0]}",
                hint="--ray-address HOST:6379, auto for the cluster that this host is part of",
            ) from None
        resources = self._ray.cluster_resources()
        self._gpus = int(resources.get("GPU", 0))
        self.size = self._actors or self._gpus or 1
        if self._gpus:
            self._threads = 1  # see streams.one_core_each
        elif self.size > 1:
            self._threads = max(1, int(resources.get("CPU", 1)) // self.size)
        self._asking = self._asking.on(device="cuda" if self._gpus else "cpu")  # an actor sees its own only
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()
        self._redirected.__exit__(None, None, None)

    def answers(self, clips: Sequence[Clip], listener: Listener) -> Iterator[Record]:
        """A record for every question, as they are finished. Raises what keeps actors from their model."""
        missing = {item.key: item for clip in clips for item in clip}
        in_a_block = max(1, min(MOST_IN_A_BLOCK, len(clips) // (BLOCKS_PER_ACTOR * self.size)))
        for attempt in range(TRIES):
            left = [part for clip in clips if (part := tuple(item for item in clip if item.key in missing))]
            if not left:
                return
            if attempt:
                names = ", ".join(clip[0].path for clip in left[:3]) + (", ..." if len(left) > 3 else "")
                listener.warn(f"an actor died or gave up; tried again: {names}", None)
            alone = attempt == TRIES - 1
            runs = (
                [self._run([clip], 1) for clip in left]
                if alone
                else [self._run(left, 1 if attempt else in_a_block)]
            )
            for record in chain.from_iterable(runs):
                if missing.pop(record["key"], None) is not None:  # a block that ran twice tells twice
                    listener.stage(record["path"], "answered", 0, 0)
                    yield record
        for item in missing.values():
            died = WorkerError(
                f"an actor died or gave up at this clip, {TRIES} times", hint="see the logs of Ray"
            )
            yield failure(item, self._asking, died)

    def _run(self, clips: Sequence[Clip], in_a_block: int) -> Iterator[Record]:
        """Records of these clips as far as they come; a dead actor's block is missing."""
        data = self._ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1
        rows = [{"clip": json.dumps([asdict(item) for item in clip])} for clip in clips]
        blocks = data.from_items(rows, override_num_blocks=-(-len(rows) // in_a_block))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # _remote_options: Ray has no other way to say it yet
            rows_back = blocks.map_batches(
                Answerer,
                batch_size=in_a_block,
                compute=data.ActorPoolStrategy(size=min(self.size, len(rows))),
                fn_constructor_args=(self._asking, os.getcwd(), self._threads, self._pace),
                num_gpus=min(1.0, self._gpus / self.size) if self._gpus else None,
                num_cpus=1,
                ray_remote_args_fn=_remote_options,
            )
        for row in rows_back.iter_rows():
            record = json.loads(row["record"])
            if "problem" in record:
                kind, message, hint = record["problem"]
                raise getattr(errors, kind, SeatsError)(message, hint=hint)
            yield record


def _remote_options() -> dict[str, Any]:
    """Actors come back by themselves; their blocks, which Ray would send for ever, `answers` sends again."""
    return {"max_restarts": -1, "max_task_retries": 0}


def _imported() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            f"--engine ray needs Ray Data ({error})", hint="pip install 'seats-cli[ray]'"
        ) from None
    return ray
