"""A clip read once answers as the file does, for every method, without touching file or encoders again."""

from pathlib import Path
from typing import Any

import pytest

from seats_cli.errors import UsageError
from seats_cli.selection.layout import TokenLayout
from seats_cli.selection.methods import METHODS, Method
from seats_cli.selection.plan import ClipCounts, Plan
from seats_cli.selection.planning import full_plan
from seats_cli.session import AskOptions, Session

QUESTION = "which shape is white"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from seats_cli.demo.write import write_clip

    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, 7, 9.0, "dev")
    return path


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


@pytest.mark.parametrize("method", METHODS)
def test_a_read_clip_answers_as_its_file_does(session: Session, clip: Path, method: str) -> None:
    options = AskOptions(ratio=0.2, method=method, max_new_tokens=6)
    from_file = session.ask(clip, QUESTION, options)
    read = session.ask(session.read(clip, options), QUESTION, options)
    assert read.text == from_file.text
    assert read.report.tokens == from_file.report.tokens
    assert read.report.media == from_file.report.media
    assert {"read", "encode_video", "encode_audio"} <= set(from_file.report.timing.stages)


def test_a_read_clip_needs_neither_file_nor_encoders(
    session: Session, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    read = session.read(copy)
    copy.unlink()
    monkeypatch.setattr(session.adapter, "encode_video", None)
    monkeypatch.setattr(session.adapter, "encode_audio", None)
    first, second, first_again = (
        session.ask(read, question) for question in (QUESTION, "what is said?", QUESTION)
    )
    assert first.text == first_again.text != second.text
    assert not {"read", "encode_video", "encode_audio"} & set(first.report.timing.stages)


def test_a_question_must_agree_with_what_was_read(session: Session, clip: Path) -> None:
    read = session.read(clip, AskOptions(fps=2.0))
    with pytest.raises(UsageError, match="read with another sampling"):
        session.ask(read, QUESTION, AskOptions(fps=1.0))


class Everything(Method):
    """A method that is in no table."""

    name = "everything"
    summary = source = "a test"

    def plan(self, preset: Any, ratio: float, counts: ClipCounts, options: Any) -> Plan:
        return full_plan(self.name, preset, counts, options)

    def after_layer(self, layer: int, scores: Any, layout: TokenLayout, plan: Plan) -> Any:
        raise AssertionError("nothing is ever cut")


def test_a_method_of_one_s_own_can_be_asked_with(session: Session, clip: Path) -> None:
    own = session.ask(clip, QUESTION, AskOptions(method=Everything()))
    assert own.text == session.ask(clip, QUESTION, AskOptions(method="full")).text
    assert own.report.to_json()["options"]["method"] == "everything"


def test_the_model_s_own_answer_is_likelier_than_another(session: Session, clip: Path) -> None:
    read, options = session.read(clip), AskOptions(method="full")
    answer = session.ask(read, QUESTION, options).text
    own, other = (session.log_likelihood(read, QUESTION, words, options) for words in (answer, "the"))
    assert other < own <= 0.0
