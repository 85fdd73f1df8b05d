"""What is known of a question once it was asked: one flat record, the same keys whatever came of it.

docs/answers.schema.json is its published form. A later version only adds keys, and raises SCHEMA_VERSION when
it changes what one means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from seats_cli.batch.sources import Item
from seats_cli.errors import SeatsError, unexpected

if TYPE_CHECKING:
    from seats_cli.session import Answer, AskOptions

Record = dict[str, Any]
SCHEMA_VERSION = 1
COLUMNS = (  # of a record, in order; `tokens.video` is the key video of tokens
    "schema_version",
    "key",
    "path",
    "question",
    "id",
    "start_s",
    "end_s",
    "ok",
    "answer",
    "error.kind",
    "error.message",
    "error.hint",
    "warnings",
    "tokens.text",
    "tokens.video",
    "tokens.audio",
    "tokens.kept",
    "tokens.generated",
    "tokens.finish_reason",
    "timing.read_s",
    "timing.prefill_s",
    "timing.generate_s",
    "model",
    "method",
    "ratio",
)


@dataclass(frozen=True)
class Asking:
    """How every question is asked, wherever that happens: it travels to other processes and hosts.

    model, asked: keywords of ModelOptions and of AskOptions, but for a clip's range
    limits:       keywords of media.Limits: what a file may cost
    """

    model: Mapping[str, Any] = field(default_factory=lambda: {"model": "tiny"})
    asked: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)

    def options(self, item: Item) -> "AskOptions":
        """The call's options for one question. Raises UsageError for a range that no clip could have."""
        from seats_cli.session import AskOptions

        options = AskOptions(**self.asked)
        if item.start_s is None and item.end_s is None:
            return options
        start_s = options.start_s if item.start_s is None else item.start_s
        return replace(options, start_s=start_s, end_s=options.end_s if item.end_s is None else item.end_s)

    def on(self, **changes: Any) -> "Asking":
        """The same on another device, or loaded otherwise."""
        return replace(self, model={**self.model, **changes})


def success(item: Item, asking: Asking, answer: "Answer", read_s: float, warnings: Sequence[str]) -> Record:
    """The record of an answer. `read_s`: seconds that opening and encoding its clip took."""
    report = answer.report
    before, stages = report.tokens.before, report.timing.stages
    tokens = {
        "text": before.text,
        "video": before.video,
        "audio": before.audio,
        "kept": report.retention.reached.overall,
        "generated": report.tokens.generated,
        "finish_reason": report.tokens.finish_reason,
    }
    timing = {
        "read_s": round(read_s, 6),
        "prefill_s": round(stages.get("select", 0.0) + stages.get("prefill", 0.0), 6),
        "generate_s": round(stages.get("generate", 0.0), 6),
    }
    return _record(item, asking, ok=True, answer=answer.text, warnings=warnings, tokens=tokens, timing=timing)


def failure(item: Item, asking: Asking, error: BaseException, warnings: Sequence[str] = ()) -> Record:
    """The record of a question that came to no answer."""
    shown = error if isinstance(error, SeatsError) else unexpected(error)
    told = {"kind": shown.kind, "message": str(shown), "hint": shown.hint}
    return _record(item, asking, ok=False, error=told, warnings=warnings)


def _record(item: Item, asking: Asking, *, ok: bool, warnings: Sequence[str], **known: Any) -> Record:
    """One line; what does not apply is null.

    tokens: of the prompt before selection, the share kept (mean over layers) and those of the answer
    timing: seconds: from opening the clip until all of it was encoded, once for all its questions; selection
            and prefill; the answer
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "key": item.key,
        "path": item.path,
        "question": item.question,
        "id": item.id,
        "start_s": item.start_s,
        "end_s": item.end_s,
        "ok": ok,
        "answer": known.get("answer"),
        "error": known.get("error"),
        "warnings": list(warnings),
        "tokens": known.get("tokens"),
        "timing": known.get("timing"),
        "model": asking.model["model"],
        "method": _asked(asking, "method"),
        "ratio": _asked(asking, "ratio"),
    }


def _asked(asking: Asking, name: str) -> Any:
    """An option, or its default, which takes heavy imports to know."""
    if name in asking.asked:
        return asking.asked[name]
    from seats_cli.session import AskOptions

    return next(option.default for option in fields(AskOptions) if option.name == name)
