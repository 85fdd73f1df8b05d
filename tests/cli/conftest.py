"""A scripted session in place of a model, so that the command line is tested in milliseconds."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from seats_cli import session
from seats_cli.cli.app import build_app
from seats_cli.errors import MediaError
from seats_cli.measure.report import (
    SCHEMA_VERSION,
    ComputeReport,
    DropCounts,
    EnvironmentReport,
    MemoryReport,
    Ratios,
    Report,
    RetentionReport,
    TimingReport,
    TokenCounts,
    TokenReport,
)

Run = Callable[..., Result]


def make_report(path: str, question: str, text: str, options: Mapping[str, Any], **changes: Any) -> Report:
    """A report with round numbers, of full tokens where the options say so."""
    full = options.get("method") == "full"
    before = TokenCounts.of((20, 1000, 100))
    kept = before if full else TokenCounts.of((20, 84, 49))
    end = before if full else TokenCounts.of((20, 0, 0))
    reached = Ratios(1.0, 1.0, 1.0) if full else Ratios(0.0982, 0.06, 0.48)
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "media": {"path": path},
        "question": question,
        "answer": text,
        "method": {"name": options.get("method", "seats"), "preset": "tiny"},
        "tokens": TokenReport(
            before=before,
            after_stage_1=kept,
            drops=() if full else (DropCounts(8, TokenCounts.of((20, 60, 30))), DropCounts(11, end)),
            end=end,
            per_layer=(kept,) * 14,
            generated=5,
            finish_reason="length" if text.endswith("...") else "stop",
        ),
        "retention": RetentionReport(asked=Ratios(options.get("ratio"), 0.06, 0.48), reached=reached),
        "compute": ComputeReport(10**12, 10**12 if full else 10**11, 1.0 if full else 0.1),
        "timing": TimingReport(
            load_s=1.5,
            stages={"probe": 0.002, "prefill": 1.0 if full else 0.25},
            time_to_first_token_s=2.0 if full else 0.5,
            tokens_per_s=50.0,
            total_s=3.0 if full else 1.0,
        ),
        "memory": MemoryReport(1 << 20 if full else 1 << 18, 1 << 20, 1 << 30, "test"),
        "environment": EnvironmentReport(
            seats="0", python="3", torch="2", transformers="5", av="18", platform="test", device="cpu",
            device_name="test CPU", dtype="float32", attention="sdpa", model="tiny", revision=None,
            family="qwen2_5_omni", parameters=12, random_weights=False,
        ),
        "options": dict(options),
    }  # fmt: skip
    return Report(**{**values, **changes})


@dataclass
class Script:
    """What the scripted session says to each file name, and what it was asked."""

    replies: dict[str, str | BaseException] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    load_error: Exception | None = None
    opened: list[session.ModelOptions] = field(default_factory=list)
    asked: list[tuple[str, str, session.AskOptions]] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    elsewhere: int = 0  # of those that were read, how many another process decodes
    setup_error: Exception | None = None
    limits: session.Limits | None = None

    @property
    def last(self) -> session.AskOptions:
        """The options of the last question."""
        return self.asked[-1][2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """The script of the session that `seats ask` opens in this test."""
    written = Script()

    class ScriptedSession:
        def __init__(
            self,
            options: session.ModelOptions,
            *,
            log: Any = None,
            note: Any = None,
            warn: Any = None,
            limits: session.Limits | None = None,
        ) -> None:
            written.limits = limits
            written.opened.append(options)
            if written.load_error is not None:
                raise written.load_error
            log("device cpu: there is no other")
            self.note, self.warn = note, warn
            self.is_embedded = options.model == "tiny"
            self.random_weights = options.load_format == "dummy"

        def ask(
            self,
            media: str,
            question: str,
            options: session.AskOptions,
            *,
            on_text: Callable[[str], None] | None = None,
            on_stage: Callable[[str, int, int], None] | None = None,
        ) -> session.Answer:
            written.asked.append((str(media), question, options))
            for warning in written.warnings:
                self.warn(warning)
            self.note("1024 video and 400 audio tokens")
            reply = written.replies.get(Path(media).name, "a red star")
            if on_stage is not None:
                on_stage("encode_video", 1, 2)
            for piece in str(reply).split(" ") if isinstance(reply, str) and on_text else ():
                on_text(f"{piece} ")
            if isinstance(reply, BaseException):
                if on_text is not None:
                    on_text("half an ans")
                raise reply
            report = make_report(str(media), question, reply, asdict(options))
            return session.Answer(reply, report)

        adapter = SimpleNamespace(device=torch.device("cpu"), fused=True)
        graph = None

        def setup(self, options: session.AskOptions) -> None:
            if isinstance(written.setup_error, Exception):
                raise written.setup_error

        def read(
            self, media: str, options: session.AskOptions, *, on_stage: Any, warn: Any, opener: Any = None
        ) -> Any:
            written.read.append(str(media))
            written.elsewhere += opener is not None
            on_stage("encode_video", 1, 2)
            for warning in written.warnings:
                warn(warning)
            reply = written.replies.get(Path(media).name)
            if isinstance(reply, MediaError):
                raise reply
            return SimpleNamespace(media=str(media), seconds=0.5, encoded=None)

        def prefill(
            self, read: Any, question: str, options: session.AskOptions, *, on_stage: Any, warn: Any
        ) -> Any:
            return SimpleNamespace(media=read.media, question=question, options=options)

        def generate(self, run: Any, *, on_stage: Any) -> session.Answer:
            warnings, written.warnings = written.warnings, []
            try:
                return self.ask(run.media, run.question, run.options, on_stage=on_stage)
            finally:
                written.warnings = warnings

    monkeypatch.setattr(session, "Session", ScriptedSession)
    return written


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests see neither the variables nor the config file of whoever runs them."""
    for name in [name for name in os.environ if name.startswith("SEATS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def run() -> Run:
    """`run("ask", clip, "why?", env={...})`: the command line in this process, with separate streams; `input`
    comes on stdin."""

    def invoke(
        *arguments: str | Path, env: Mapping[str, str] | None = None, input: str | bytes | None = None
    ) -> Result:
        typed = [str(argument) for argument in arguments]
        return CliRunner().invoke(build_app(decorated=False), typed, env=env, input=input)

    return invoke


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A file that is there; the scripted session does not look inside."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not really a clip")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files in `videos`, the current folder above it."""
    place = tmp_path / "videos"
    place.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (place / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return place


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
