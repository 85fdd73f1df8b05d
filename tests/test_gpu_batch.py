"""On a CUDA device: reading one clip ahead, on a stream of its own, changes no record; nor do workers."""

import time
from typing import Any

import pytest
import torch

from omni_inputs import encoders_at_once
from seats_cli.batch.decoders import Pace
from seats_cli.batch.reading import Clip, Listener
from seats_cli.batch.records import Asking, Record
from seats_cli.batch.run import check_device, run_batch
from seats_cli.batch.sources import Item
from seats_cli.batch.streams import own_stream
from seats_cli.batch.team import AnsweringCrew, answered
from seats_cli.engine.decode import sent_to_host
from seats_cli.engine.graph import recording_stream
from seats_cli.errors import DeviceError
from seats_cli.model.omni import ENCODERS_AT_ONCE, ENCODERS_LAUNCHED_AT_ONCE
from seats_cli.session import ModelOptions, Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Twelve clips of the toy world, two questions each, one broken."""
    from seats_cli.demo.write import write_clip

    folder = tmp_path_factory.mktemp("clips")
    for number in range(12):
        write_clip(folder / f"{number}.mp4", number, 8.0 + number % 3, "dev", size=128)
    (folder / "5.mp4").write_bytes(b"broken")
    return [
        tuple(
            Item(str(folder / f"{number}.mp4"), text, key=f"{number}-{i}")
            for i, text in enumerate(("what is said?", "which shape is white"))
        )
        for number in range(12)
    ]


def timeless(records: Any) -> list[Record]:
    return [{**record, "timing": None} for record in records]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fast", [True, False])
def test_reading_ahead_changes_nothing(clips: list[Clip], dtype: str, fast: bool) -> None:
    """Several times over: what is shared by mistake between two streams is wrong now and then only."""
    asking = Asking({"model": "tiny"}, {"max_new_tokens": 12, "ratio": 0.2})
    session = Session(ModelOptions(device="cuda", dtype=dtype, compile=fast, graphs=fast))
    plain = timeless(run_batch(session, clips, asking, ahead=0))
    assert [record["ok"] for record in plain].count(False) == 2
    for ahead in (1, 1, 2, 3):
        assert timeless(run_batch(session, clips, asking, ahead=ahead)) == plain


def test_everything_at_once_changes_nothing(clips: list[Clip]) -> None:
    """Readers, a thread that prefills, and answers that are decoded together: four streams and more."""
    asking = Asking({"model": "tiny"}, {"max_new_tokens": 12, "ratio": 0.2})
    session = Session(ModelOptions(device="cuda", dtype="float32"))
    plain = {record["key"]: record for record in timeless(run_batch(session, clips, asking, ahead=0))}
    for pace in (Pace(0, 4), Pace(4, 4), Pace(4, 8), Pace(4, 2)):
        found = {record["key"]: record for record in timeless(answered(session, clips, asking, pace))}
        assert found == plain


def test_prefills_go_before_decoding_and_that_before_reading(
    clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several streams with work a GPU takes it from the one of the lowest number."""
    seen: dict[str, set[int]] = {"read": set(), "prefill": set()}

    def noting(name: str) -> Any:
        whole = getattr(Session, name)

        def noted(self: Session, *args: Any, **options: Any) -> Any:
            seen[name].add(torch.cuda.current_stream().priority)
            return whole(self, *args, **options)

        return noted

    session = Session(ModelOptions(device="cuda"))
    for name in seen:
        monkeypatch.setattr(Session, name, noting(name))
    asking = Asking({"model": "tiny"}, {"max_new_tokens": 4, "ratio": 0.2})
    list(answered(session, clips, asking, Pace(2, 4)))
    ((reading,), (prefilling,)) = seen.values()
    assert prefilling < recording_stream(session.adapter.device).priority < reading


@pytest.mark.parametrize("fast", [True, False])
def test_encoders_that_only_launch_run_one_at_a_time(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    adapter = Session(ModelOptions(device="cuda", compile=fast, graphs=False)).adapter
    expected = ENCODERS_LAUNCHED_AT_ONCE if fast else ENCODERS_AT_ONCE
    assert encoders_at_once(adapter, monkeypatch) == expected


def test_what_is_launched_on_a_stream_is_done_when_the_gpu_is_past_it() -> None:
    with own_stream(torch.device("cuda")) as launched:
        nothing = launched()
        nothing.wait()
        torch.cuda._sleep(1_000_000_000)  # half a second
        something = launched()
        assert (nothing.done, something.done) == (True, False)
        something.wait()
        assert something.done


def test_waiting_for_tokens_of_a_batch_leaves_the_core() -> None:
    tokens = torch.arange(8, device="cuda")
    sent_to_host(tokens, idle=True)()  # the pinned memory is there
    torch.cuda._sleep(500_000_000)  # clock cycles: a quarter of a second
    arrived = sent_to_host(tokens, idle=True)
    wall_s, own_s = time.perf_counter(), time.thread_time()
    assert arrived() == list(range(8))
    wall_s, own_s = time.perf_counter() - wall_s, time.thread_time() - own_s
    assert wall_s > 0.1
    assert own_s < wall_s / 4


def test_a_worker_on_a_gpu_answers_as_this_process_does(clips: list[Clip]) -> None:
    model = {"model": "tiny", "device": "auto", "dtype": "float32"}
    asking = Asking(model, {"max_new_tokens": 12, "ratio": 0.2})
    session = Session(ModelOptions(device="cuda", dtype="float32"))
    plain = timeless(run_batch(session, clips, asking, ahead=0))
    with AnsweringCrew(["cuda:0"], asking, warn=pytest.fail, log=lambda _: None) as crew:
        found = {record["key"]: record for record in timeless(crew.answers(clips, Listener()))}
    assert [found[record["key"]] for record in plain] == plain


def test_an_error_that_the_device_survives_is_the_question_s_alone() -> None:
    check_device(torch.device("cuda"), RuntimeError("shapes do not match"))


def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceError, match=r"illegal memory access was encountered$"):
        check_device(torch.device("cuda"), RuntimeError("CUDA error"))
