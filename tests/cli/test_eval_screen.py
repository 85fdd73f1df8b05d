"""What a person sees of a sweep: tables, notes, progress."""

import io
import json
import re
from typing import Any

import pytest

from seats_cli.cli.console import Terminal
from seats_cli.cli.eval_screen import EvalTerminal, Remaining, result_tables, row_notes, span
from seats_cli.lab.records import Record
from seats_cli.lab.results import summarise
from seats_cli.lab.settings import Setting


def record(clip: int, family: str, correct: bool, **changes: Any) -> Record:
    values = {
        "id": f"{clip}-{family}", "clip": str(clip), "family": family, "correct": correct, "wer": None,
        "retention": 0.1, "compute_ratio": 0.08, "prefill_s": 0.03, "generate_s": 0.01, "error": None,
    }  # fmt: skip
    return values | changes


def test_tables_show_what_varies_and_dashes_where_it_does_not() -> None:
    full, on = Setting("full", 1.0), Setting("seats", 0.1, None, (("merge", "on"),))
    right = [record(clip, "text", True) for clip in range(3)]
    wrong = [record(clip, "text", clip > 0) for clip in range(3)]
    (table,) = result_tables(summarise({full: right, on: wrong}), "title", ["merge"])  # one family: no more
    assert table.columns == (
        "method",
        "ratio",
        "merge",
        "accuracy",
        "% of full",
        "kept",
        "compute",
        "time",
        "n",
    )
    assert table.rows[0][:4] == ("full", "1", "-", "100 (100-100)")
    assert table.rows[1][:3] == ("seats", "0.1", "on")
    assert table.rows[1][3].startswith("66.7 (")
    fixed = Setting("fixed", 0.1)
    mixed = [*wrong, record(0, "sound", True)]
    rows = summarise({full: right, on: mixed, fixed: wrong}, against="fixed")
    table, families = result_tables(rows, "title", [])
    assert "points over fixed" in table.columns
    assert table.rows[0][4] == table.rows[2][4] == "-"
    assert families.columns == ("method", "ratio", "text", "sound")
    assert families.rows == (
        ("full", "1", "100", "-"),
        ("seats", "0.1", "66.7", "100"),
        ("fixed", "0.1", "66.7", "-"),
    )


def test_notes_give_reasons() -> None:
    full, seats = Setting("full", 1.0), Setting("seats", 0.1)
    none = {"kind": "plan", "message": "too small", "hint": None}
    broken = {"kind": "media", "message": "broken", "hint": None}
    found = [
        record(0, "text", True),
        record(1, "text", False, error=none),
        record(2, "text", False, error=broken),
    ]
    assert row_notes(summarise({full: [], seats: found})) == [
        "seats at 0.1: not possible for 1 of 3 questions: too small",
        "seats at 0.1: 1 question failed, in no number here",
    ]
    assert row_notes(summarise({full: [], seats: found[1:2]})) == ["seats at 0.1: not possible: too small"]


def test_the_time_that_is_left() -> None:
    moments = iter([0.0, 100.0, 130.0, 160.0, 170.0])
    clock = Remaining(lambda: next(moments))
    assert clock.left(500, 1000) == ""  # what a file had already says nothing about the pace
    assert clock.left(510, 1000) == ""
    assert clock.left(600, 1000) == ", 4 min left"
    assert clock.left(1000, 1000) == ""


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.1, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (150, "2 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_spans(duration_s: float, text: str) -> None:
    assert span(duration_s) == text


class Screen(io.StringIO):
    encoding = "utf-8"

    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.watched = watched

    def isatty(self) -> bool:
        return self.watched


def terminal_on(watched: bool, **switches: bool) -> EvalTerminal:
    plain = Terminal()
    plain.out, plain.err = Screen(watched), Screen(watched)
    for name, value in switches.items():
        setattr(plain, name, value)
    return EvalTerminal.like(plain)


def test_progress_is_a_line_now_and_then_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(Remaining.__init__, "__defaults__", (lambda: now[0],))
    terminal = terminal_on(watched=False)
    terminal.subject = "clip.mp4"
    with terminal.counting("answers") as progress:
        for step in range(1000):
            now[0] = step * 0.1
            progress(step, 1000)
        progress(1000, 1000)
    lines = terminal.err.getvalue().splitlines()
    assert lines == [
        "100 of 1000 answers, 2 min left",
        "400 of 1000 answers, 1 min left",
        "700 of 1000 answers, 30 s left",
    ]
    quiet = terminal_on(watched=False, quiet=True)
    with quiet.counting("answers") as progress:
        progress(1, 1000)
    assert quiet.err.getvalue() == ""


def test_a_person_sees_bars_and_drawn_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = terminal_on(watched=True)
    with terminal.counting("answers") as progress:
        progress(0, 100)
        progress(50, 100)
    assert "answers" in terminal.err.getvalue()
    (table,) = result_tables(summarise({Setting("full", 1.0): [record(0, "all", True)]}), "title", [])
    terminal.report(table)
    assert "╭" in terminal.out.getvalue()
    assert "╭" not in terminal.err.getvalue()


def test_on_a_narrow_screen_columns_move_to_a_second_table_and_no_number_folds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    rows = summarise(
        {
            Setting("full", 1.0): [record(i, f"family-{i}", True) for i in range(12)],
            Setting("divprune-om", 0.1): [record(i, f"family-{i}", bool(i % 2)) for i in range(12)],
        }
    )
    terminal = terminal_on(watched=True)
    for table in result_tables(rows, "title", []):
        terminal.report(table)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.out.getvalue()).splitlines()
    assert all(len(line) <= 80 for line in lines)
    heads = [line for line in lines if "method" in line]
    assert len(heads) > 2
    assert all("ratio" in line for line in heads)
    shown = {word for line in heads for word in line.split()}
    assert {f"family-{i}" for i in range(12)} | {"accuracy", "compute", "n"} <= shown
    assert sum("divprune-om" in line for line in lines) == len(heads)


def test_names_of_families_cannot_disturb_a_terminal() -> None:
    nasty = "a\u202eb\x1b[31mc\nd"
    rows = summarise({Setting("full", 1.0): [record(0, nasty, True), record(1, "plain", True)]})
    for watched in (True, False):
        terminal = terminal_on(watched=watched)
        for table in result_tables(rows, nasty, []):
            terminal.report(table)
        terminal.document({"family": nasty})
        shown = terminal.out.getvalue()
        assert "\u202e" not in shown
        assert "[31m" in shown
        assert "\x1b[31mc" not in shown
    assert json.loads(shown[shown.index("{") :]) == {"family": nasty}


def test_what_holds_for_several_rows_is_said_once() -> None:
    error = {"kind": "media", "message": "broken", "hint": None}
    settings = [Setting("seats", ratio) for ratio in (0.5, 0.4, 0.3, 0.2, 0.1)]
    failed = {setting: [record(0, "text", False, error=error)] for setting in settings}
    assert row_notes(summarise(failed)) == ["every row: 1 question failed, in no number here"]
    some = {Setting("full", 1.0): [record(0, "text", True)], **failed}
    (line,) = row_notes(summarise(some))
    assert line == (
        "seats at 0.5; seats at 0.4; seats at 0.3; 2 rows more: 1 question failed, in no number here"
    )
