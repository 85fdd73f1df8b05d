"""Timers that are right on a device that runs behind the host, and the peak of memory.

Stages are exclusive: one entered inside another pauses it, so every second of a clock is counted once. On a
GPU there are two clocks: stages that launch work are timed on the device, by events between which its stream
ran, so that nobody waits for it and the host can launch ahead; stages of the host alone are timed there. The
two may overlap. Elsewhere there is one clock, and the stages add up to the wall time less what none claimed.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# In pipeline order; a report lists them in this order. `read` decodes the media file, `generate` the answer.
STAGES = (
    "load",
    "probe",
    "read",
    "preprocess",
    "encode_video",
    "encode_audio",
    "select",
    "prefill",
    "generate",
)
# Stages that launch work on the device: their end waits for it. The others run on the host alone.
DEVICE_STAGES = frozenset(
    {"load", "preprocess", "encode_video", "encode_audio", "select", "prefill", "generate"}
)
FIRST_TOKEN = "first_token"


class Stopwatch:
    """Seconds per named stage, accumulated over as many entries as there are."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        now: Callable[[], float] = time.perf_counter,
        wait: bool = False,
    ) -> None:
        """`device`: where device stages run; `now`: a monotonic clock in seconds (tests pass their own).
        `wait`: end each device stage by waiting for the device, also on CUDA: for work on several GPUs, of
        which one's events tell little."""
        self.device = torch.device(device)
        self._by_events = self.device.type == "cuda" and not wait
        self._event: torch.cuda.Event | None = None
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._now = now
        self._running: list[str] = []
        self._since = now()
        self._started = self._since
        self._seconds: dict[str, float] = {}
        self._marks: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the time of the block to `name` (one of STAGES), less what inner stages take."""
        if name not in STAGES:
            raise ValueError(f"no stage is called {name!r}; there are {', '.join(STAGES)}")
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def mark(self, name: str) -> None:
        """Note the moment; the caller has synchronised. Of several under one name the first counts."""
        self._marks.setdefault(name, self._now() - self._started)

    def add(self, name: str, seconds: float) -> None:
        """Charge time that was measured elsewhere, such as loading a model before the first question."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def marked(self, name: str) -> float | None:
        """Seconds from the start to a mark; None if it was never reached."""
        return self._marks.get(name)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every finished stage that was entered, in pipeline order; waits for their work."""
        spans, self._spans = self._spans, []
        for name, start, end in spans:
            end.synchronize()
            self.add(name, start.elapsed_time(end) / 1000)
        return {name: self._seconds[name] for name in STAGES if name in self._seconds}

    @property
    def elapsed(self) -> float:
        """Seconds since the stopwatch was made, stages or not."""
        return self._now() - self._started

    def _charge(self) -> None:
        """Give the time since the last boundary to the running stage."""
        name = self._running[-1] if self._running else None
        before, self._event = self._event, self._mark_device()
        if name in DEVICE_STAGES and before is not None and self._event is not None:
            self._spans.append((name, before, self._event))
            self._since = self._now()
            return
        if name in DEVICE_STAGES:
            synchronise(self.device)
        moment = self._now()
        if name is not None:
            self.add(name, moment - self._since)
        self._since = moment

    def _mark_device(self) -> torch.cuda.Event | None:
        """An event at the end of what the device was asked so far; None where there are none."""
        if not self._by_events:
            return None
        return recorded(self.device, timed=True)


def recorded(device: torch.device, *, timed: bool = False) -> torch.cuda.Event:
    """An event at the end of what this thread has asked of a CUDA device so far. Who waits for it leaves the
    core to others: a batch waits in a dozen threads, and decoders need the cores."""
    event = torch.cuda.Event(enable_timing=timed, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def idle_until_done(device: torch.device) -> None:
    """Wait for all that this thread has asked of a device, and leave the core to others meanwhile; elsewhere
    than on CUDA, for all that was asked."""
    if device.type == "cuda":
        recorded(device).synchronize()
    else:
        synchronise(device)


class DeviceSpan:
    """A context manager that lets a CUDA device time what is launched inside, by its own events.

    Against the wall clock it leaves out the host's launching before the first kernel, and nothing else waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []

    def __enter__(self) -> "DeviceSpan":
        self._record()
        return self

    def __exit__(self, *_: object) -> None:
        self._record()

    def _record(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)

    @property
    def seconds(self) -> float | None:
        """Seconds on the device, once it is done (waits for that); None on other devices."""
        if len(self._events) < 2:
            return None
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class PeakMemory:
    """The most memory used, and whose: `bytes` is None where the platform does not tell."""

    bytes: int | None
    source: str


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak on CUDA devices. A process's peak on the host cannot be reset."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_memory(device: torch.device) -> PeakMemory:
    """Peak bytes: tensors on all CUDA devices since `reset_peak_memory`, else the process's resident set."""
    if device.type == "cuda":
        peaks = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
        return PeakMemory(sum(peaks), "device tensors, all CUDA devices")
    try:
        import resource  # not on Windows
    except ImportError:
        return PeakMemory(None, "unknown on this platform")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_bytes = peak if sys.platform == "darwin" else peak * 1024
    return PeakMemory(in_bytes, "process resident set since it started")
