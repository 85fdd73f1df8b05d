"""The stopwatch counts every second once."""

from contextlib import suppress

import pytest
import torch

from seats_cli.measure.clock import FIRST_TOKEN, STAGES, DeviceSpan, Stopwatch, peak_memory, reset_peak_memory


class FakeTime:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.value = 100.0

    def __call__(self) -> float:
        return self.value


def test_stages_accumulate_and_come_in_pipeline_order() -> None:
    time = FakeTime()
    watch = Stopwatch(now=time)
    for name, seconds in (("prefill", 2.0), ("read", 1.0), ("prefill", 0.5)):
        with watch.stage(name):
            time.value += seconds
    assert watch.seconds == {"read": 1.0, "prefill": 2.5}
    assert list(watch.seconds) == ["read", "prefill"]


def test_an_inner_stage_pauses_the_outer_one() -> None:
    time = FakeTime()
    watch = Stopwatch(now=time)
    with watch.stage("encode_video"):
        time.value += 1.0
        with watch.stage("read"):
            time.value += 10.0
        time.value += 2.0
    time.value += 5.0  # no stage: charged to none
    assert watch.seconds == {"read": 10.0, "encode_video": 3.0}
    assert watch.elapsed == 18.0


def test_a_stage_that_raises_is_still_charged_and_closed() -> None:
    time = FakeTime()
    watch = Stopwatch(now=time)
    with suppress(RuntimeError), watch.stage("select"):
        time.value += 1.0
        raise RuntimeError
    with watch.stage("prefill"):
        time.value += 1.0
    assert watch.seconds == {"select": 1.0, "prefill": 1.0}


def test_unknown_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="no stage is called"), Stopwatch().stage("prefil"):
        pass
    assert len(set(STAGES)) == len(STAGES)


def test_the_first_mark_counts() -> None:
    time = FakeTime()
    watch = Stopwatch(now=time)
    assert watch.marked(FIRST_TOKEN) is None
    time.value += 3.0
    watch.mark(FIRST_TOKEN)
    time.value += 3.0
    watch.mark(FIRST_TOKEN)
    assert watch.marked(FIRST_TOKEN) == 3.0


def test_time_measured_elsewhere_is_added() -> None:
    watch = Stopwatch(now=FakeTime())
    watch.add("load", 4.0)
    watch.add("load", 1.0)
    assert watch.seconds == {"load": 5.0}


def test_peak_memory_on_a_cpu_says_that_it_is_the_process() -> None:
    reset_peak_memory(torch.device("cpu"))
    peak = peak_memory(torch.device("cpu"))
    assert "process" in peak.source
    assert peak.bytes is not None
    assert peak.bytes > 50e6  # torch alone takes more: kilobytes taken for bytes would fail here


def test_a_device_span_is_for_cuda_only() -> None:
    with DeviceSpan(torch.device("cpu")) as span:
        pass
    assert span.seconds is None
