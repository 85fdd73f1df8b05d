"""What the tests of the sweep and of its workers share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seats_cli.lab.manifest import Sample
from seats_cli.lab.records import Record
from seats_cli.lab.settings import expand
from seats_cli.lab.sweep import Asking, ClipTask, Listener, keys_of, sweep

ASKING = Asking(max_new_tokens=3)
SETTINGS = expand(["seats", "fixed", "random"], [0.5])
QUESTIONS = ("what is said?", "what is the", "is a")
TIMES = ("prefill_s", "generate_s")


def samples_of(path: Path) -> list[Sample]:
    """Three questions about a clip."""
    return [
        Sample(f"{path.stem}{i}", path, question, ("a", "b"), (), f"family {i % 2}", path.name)
        for i, question in enumerate(QUESTIONS)
    ]


def run(
    team: Any, tasks: Sequence[ClipTask], kept: dict[str, Record] | None = None, **listen: Any
) -> dict[str, Record]:
    """A sweep into `kept`."""
    kept = {} if kept is None else kept
    keys = keys_of(tasks, SETTINGS, ASKING, team.described)
    sweep(team, tasks, keys, kept, Listener(**listen))
    return kept


def timeless(records: dict[str, Record]) -> dict[str, Record]:
    return {
        key: {name: record[name] for name in record if name not in TIMES} for key, record in records.items()
    }
