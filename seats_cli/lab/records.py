"""What a sweep finds: a record for each (sample, setting), and the file of them, one JSON line each.

A line is written as soon as it is known and read again by the next run, so that one that was stopped, even in
the middle of a line, goes on where it ended.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seats_cli.batch.lines import LineFile
from seats_cli.errors import PlanError, SeatsError, UsageError, unexpected
from seats_cli.lab.manifest import Sample
from seats_cli.lab.scoring import score
from seats_cli.lab.settings import Setting

if TYPE_CHECKING:
    from seats_cli.session import Answer

Record = dict[str, Any]
FIRST = b'{"key": "'  # how every line begins: what a line that was cut off is known by


def success(sample: Sample, setting: Setting, answer: "Answer") -> Record:
    """The record of an answer, scored."""
    report, scored = answer.report, score(sample, answer.text)
    before, stages = report.tokens.before, report.timing.stages
    return _record(
        sample,
        setting,
        answer=answer.text,
        correct=scored.correct,
        wer=scored.wer,
        retention=report.retention.reached.overall,
        compute_ratio=report.compute.ratio,
        tokens={
            "text": before.text,
            "video": before.video,
            "audio": before.audio,
            "generated": report.tokens.generated,
        },
        prefill_s=round(stages.get("select", 0.0) + stages.get("prefill", 0.0), 6),
        generate_s=round(stages.get("generate", 0.0), 6),
    )


def failure(sample: Sample, setting: Setting, error: Exception) -> Record:
    """The record of a job that came to no answer."""
    shown = error if isinstance(error, SeatsError) else unexpected(error)
    return _record(sample, setting, error={"kind": shown.kind, "message": str(shown), "hint": shown.hint})


def _record(sample: Sample, setting: Setting, **known: Any) -> Record:
    """One line of a sweep's file; what does not apply is null.

    tokens: of the prompt before selection, and those of the answer. prefill_s: selection and prefill.
    """
    return {
        "id": sample.id,
        "clip": sample.clip,
        "family": sample.family,
        "question": sample.question,
        "expected": list(sample.answers),
        "answer": known.get("answer"),
        "correct": known.get("correct"),
        "wer": known.get("wer"),
        "method": setting.method,
        "ratio": setting.ratio,
        "preset": setting.preset,
        "settings": dict(setting.settings),
        "retention": known.get("retention"),
        "compute_ratio": known.get("compute_ratio"),
        "tokens": known.get("tokens"),
        "prefill_s": known.get("prefill_s"),
        "generate_s": known.get("generate_s"),
        "error": known.get("error"),
    }


def is_unplanned(record: Record) -> bool:
    """Whether the method has no plan for this clip at this ratio: a fact, not a failure."""
    return record["error"] is not None and record["error"]["kind"] == PlanError.kind


def has_failed(record: Record) -> bool:
    """Whether there is no answer for a reason that another try may not meet."""
    return record["error"] is not None and not is_unplanned(record)


# ---- the file ---------------------------------------------------------------------------------------------


class RecordFile(LineFile):
    """Records on disk, by key: `known` holds what was there, `append` adds."""

    what = "record of seats eval or trace"
    example = "eval.jsonl"

    def __init__(self, path: Path, *, warn: Callable[[str], None]) -> None:
        """Open the file and read what it has. Raises UsageError where it cannot be, or is of another kind."""
        self.known: dict[str, Record] = {}
        self._lines: dict[str, int] = {}  # where the known ones stand
        self.runs: dict[str, Mapping[str, Any]] = {}  # what earlier runs noted of themselves, by key
        self._note: Mapping[str, Any] | None = None
        super().__init__(path, warn=warn)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a line, out of the process at once: what follows may be killed."""
        if self._note is not None:
            record, self._note = {**record, "run": self._note}, None
        self.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def note_run(self, key: str, facts: Mapping[str, Any]) -> None:
        """Let the next record say what run it is the first of, unless the file knows that run already."""
        if key not in self.runs:
            self._note = {"key": key, **facts}

    def damaged(self, key: str) -> UsageError:
        """What is wrong where the record of `key` is not what its readers need."""
        return UsageError(
            f"{self.path}: line {self._lines.get(key)} is a damaged record: part of it is missing or of the "
            "wrong kind",
            hint="take that line out, and what it was about is run again",
        )

    def take_in(self, record: bytes, number: int) -> bool:
        """Remember a record, and the run that it is the first of."""
        parsed = _parsed(record)
        if parsed is None:
            return False
        run = parsed.pop("run", None)
        if isinstance(run, dict):
            self.runs[str(run.get("key"))] = run
        self.known[parsed["key"]], self._lines[parsed["key"]] = parsed, number
        return True

    def may_be_cut(self, text: bytes) -> bool:
        """Every line begins alike."""
        return text.startswith(FIRST) or FIRST.startswith(text)


def _parsed(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(value, dict) and isinstance(value.get("key"), str) and "method" in value
    return value if ours else None
