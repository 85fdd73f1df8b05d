"""What a person sees and what a pipe gets."""

import io
import json
from pathlib import Path

import pytest

from cli.conftest import Script, make_report
from seats_cli.cli.ask_run import Request, answer_all
from seats_cli.cli.console import Table, Terminal, plain_table, printable
from seats_cli.cli.tables import report_tables
from seats_cli.errors import MediaError

TABLE = Table("tokens", ("", "video", "audio"), (("before", "1000", "9"), ("end", "0", "-")))


class Screen(io.TextIOWrapper):
    """A terminal that remembers what it was sent."""

    def __init__(self, encoding: str = "utf-8", *, watched: bool = True) -> None:
        self.bytes = io.BytesIO()
        self.watched = watched
        super().__init__(self.bytes, encoding=encoding, newline="")

    def isatty(self) -> bool:
        return self.watched

    @property
    def text(self) -> str:
        self.flush()
        return self.bytes.getvalue().decode(self.encoding)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Both streams watched, 100 columns wide."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    made = Terminal()
    made.out, made.err = Screen(), Screen()
    return made


def out(terminal: Terminal) -> str:
    assert isinstance(terminal.out, Screen)
    return terminal.out.text


def err(terminal: Terminal) -> str:
    assert isinstance(terminal.err, Screen)
    return terminal.err.text


def request(*media: Path, **changes: bool) -> Request:
    asked = {"method": "seats", "ratio": 0.1}
    flags = {"as_json": False, "stats": True, "compare": False, **changes}
    return Request(tuple(map(str, media)), "why?", {"model": "tiny"}, asked, **flags)


def test_a_watched_answer_comes_in_pieces_and_ends_its_line(
    terminal: Terminal, script: Script, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    keep = terminal.answer_piece
    monkeypatch.setattr(terminal, "answer_piece", lambda text: (pieces.append(text), keep(text)))
    assert answer_all(terminal, request(clip)) == 0
    assert [piece for piece in pieces if piece] == ["a ", "red ", "star "]
    assert out(terminal) == "a red star \n"


def test_a_table_is_drawn_for_a_person(terminal: Terminal, script: Script, clip: Path) -> None:
    answer_all(terminal, request(clip))
    assert "╭" in err(terminal)
    assert "after stage I" in err(terminal)
    assert "\x1b[" in err(terminal)  # the bars, taken off again, and the title


def test_no_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.warn("careful")
    terminal.table(TABLE)
    assert "\x1b[3" not in err(terminal)  # no colour is set


def test_ascii_lines_where_the_stream_has_no_others(terminal: Terminal) -> None:
    terminal.err = Screen("ascii")
    terminal.table(TABLE)
    with terminal.progress() as on_stage:
        assert on_stage is not None
        on_stage("prefill", 1, 3)
    assert "+---" in err(terminal)


def test_a_pipe_gets_words_only(terminal: Terminal, script: Script, clip: Path) -> None:
    terminal.out, terminal.err = Screen(watched=False), Screen(watched=False)
    script.warnings = ["slow"]
    with terminal.progress() as on_stage:
        assert on_stage is None
    answer_all(terminal, request(clip, compare=True))
    assert out(terminal) == "a red star\n"
    assert err(terminal).isascii()
    assert "\x1b" not in err(terminal)
    assert "\r" not in err(terminal)


def test_a_failing_answer_ends_its_line_first(terminal: Terminal, script: Script, clip: Path) -> None:
    script.replies = {"clip.mp4": MediaError("it broke off")}
    assert answer_all(terminal, request(clip)) == 1
    assert out(terminal) == "half an ans\n"


def test_a_heading_comes_with_the_first_word(terminal: Terminal, script: Script, clip: Path) -> None:
    script.replies = {"clip.mp4": "red star"}
    assert answer_all(terminal, request(Path("gone.mp4"), clip)) == 1
    assert out(terminal) == f"==> {clip} <==\nred star \n"


def test_quiet_shows_no_progress(terminal: Terminal) -> None:
    terminal.quiet = True
    with terminal.progress() as on_stage:
        assert on_stage is None


def test_progress_leaves_nothing_and_stops_for_the_answer(terminal: Terminal) -> None:
    with terminal.progress() as on_stage:
        assert on_stage is not None
        on_stage("encode_video", 1, 4)
        terminal.answer_piece("red")
        before = err(terminal)
        on_stage("encode_video", 2, 4)
        assert err(terminal) == before
    assert "encode video" in before
    assert before.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back and the line is clean


def test_text_that_the_stream_cannot_carry(terminal: Terminal) -> None:
    terminal.out = Screen("ascii", watched=False)
    terminal.answer("grün")
    terminal.document({"answer": "grün"})
    first, rest = out(terminal).split("\n", 1)
    assert first == "gr\\xfcn"
    assert json.loads(rest) == {"answer": "grün"}


def test_messages_cannot_steer_the_terminal(terminal: Terminal) -> None:
    terminal.error(MediaError("no such file: a\x1b[2Jb.mp4"))
    assert "a\\x1b[2Jb.mp4" in err(terminal)
    assert printable("a\tb\nc\x07") == "a\tb\nc\\x07"


def test_markup_in_a_file_name_is_no_markup(terminal: Terminal) -> None:
    terminal.error(MediaError("no such file: [red]a[/red].mp4"))
    assert "[red]a[/red].mp4" in err(terminal)


def test_plain_table() -> None:
    assert plain_table(TABLE).splitlines() == [
        "tokens",
        "          video  audio",
        "  before   1000      9",
        "  end         0      -",
    ]
    facts = Table("models", ("", ""), (("tiny", "ok"), ("Qwen-Omni", "none")), numbers=False)
    assert plain_table(facts).splitlines() == ["models", "  tiny       ok", "  Qwen-Omni  none"]


def test_every_table_is_rectangular_and_ascii() -> None:
    report = make_report("a.mp4", "why?", "a", {"method": "seats", "ratio": 0.1})
    full = make_report("a.mp4", "why?", "b", {"method": "full", "ratio": 1.0})
    for table in (*report_tables(report), *report_tables(report, full)):
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert plain_table(table).isascii()


def test_what_does_not_apply_is_a_dash() -> None:
    from dataclasses import replace

    report = make_report("a.mp4", "why?", "a", {"method": "seats", "ratio": 0.1})
    timing = replace(report.timing, tokens_per_s=None, time_to_first_token_s=None)
    memory = replace(report.memory, kv_bytes=0, peak_bytes=None)
    weights = replace(report.environment, random_weights=True)
    bare = replace(report, timing=timing, memory=memory, environment=weights)
    tokens, cost = report_tables(bare)
    rows = {row[0]: row[1:] for row in cost.rows}
    assert rows["generated"] == rows["first token after"] == rows["peak memory"] == ("", "-", "")
    assert rows["KV cache"] == ("1.0 MiB", "0 B", "-")
    assert rows["prefill compute"] == ("1.00 TFLOPs", "100.00 GFLOPs", "10.00x")
    assert tokens.title.endswith("random weights")


def test_a_bar_stays_while_records_go_elsewhere_through_stdout(terminal: Terminal) -> None:
    terminal.out = Screen(watched=False)
    with terminal.bar(4, beside_answers=True) as draw:
        assert draw is not None
        draw(f"1 of 4 - [bold]odd\x07[/] name{'x' * 200}.mp4: read", 1)
        terminal.record('{"ok": true}\n')
        assert terminal._progress is not None
        terminal._progress.refresh()
        drawn = err(terminal)
    assert "1 of 4 - [bold]odd\\x07[/] name" in drawn  # what it says, and nothing that a name could do
    assert "…" in drawn  # on one line
    assert out(terminal) == '{"ok": true}\n'
    assert terminal._progress is None


def test_a_bar_is_drawn_at_a_terminal_whose_stdout_gets_no_answers(terminal: Terminal) -> None:
    with terminal.bar(4, beside_answers=False) as draw:
        assert draw is not None
        draw("1 of 4", 1)
        assert terminal._progress is not None
        terminal._progress.refresh()
        assert "1 of 4" in err(terminal)


def test_no_bar_over_answers_or_for_nobody(terminal: Terminal) -> None:
    with terminal.bar(4, beside_answers=True) as draw:  # they go to the same screen
        assert draw is None
    for watched, quiet in ((False, False), (True, True)):
        terminal.out, terminal.err, terminal.quiet = Screen(watched=False), Screen(watched=watched), quiet
        for beside_answers in (False, True):
            with terminal.bar(4, beside_answers=beside_answers) as draw:
                assert draw is None
