"""`seats ask` over many files: records, resuming, failures, what is said meanwhile."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Run, Script, lines
from seats_cli.batch.output import Stream
from seats_cli.cli.batch_screen import BatchScreen
from seats_cli.cli.console import Terminal
from seats_cli.errors import MediaError, UsageError

ROOT = Path(__file__).parents[2]


def test_a_folder_is_answered_file_by_file_on_stdout(run: Run, script: Script, folder: Path) -> None:
    script.replies = {"b.mp4": MediaError("no frame decodes", hint="try another")}
    result = run("ask", "videos", "why?")
    assert result.exit_code == 1
    assert result.stdout == "==> videos/a.mp4 <==\na red star\n==> videos/c.mp4 <==\na red star\n"
    assert "error: videos/b.mp4: no frame decodes\nhint: try another\n" in result.stderr
    assert "2 ok, 1 failed" in result.stderr
    assert len(script.opened) == 1


def test_records_go_to_a_file_and_the_same_command_goes_on(run: Run, script: Script, folder: Path) -> None:
    script.replies = {"b.mp4": MediaError("no frame decodes"), "c.mp4": KeyboardInterrupt()}
    first = run("ask", "videos", "why?", "-o", "out.jsonl")
    assert first.exit_code == 130
    assert "interrupted; the same command goes on from there" in first.stderr
    assert [(record["path"], record["ok"]) for record in lines("out.jsonl")] == [
        ("videos/a.mp4", True),
        ("videos/b.mp4", False),
    ]
    script.replies = {}
    script.asked.clear()
    second = run("ask", "videos", "why?", "-o", "out.jsonl")
    assert second.exit_code == 1  # one has failed, if not now
    assert "out.jsonl has 2 of 3 answers already" in second.stderr
    assert [Path(path).name for path, _, _ in script.asked] == ["c.mp4"]
    assert [record["ok"] for record in lines("out.jsonl")] == [True, False, True]
    before = Path("out.jsonl").read_bytes()
    script.asked.clear()
    script.opened.clear()
    third = run("ask", "videos", "why?", "-o", "out.jsonl")
    assert (third.exit_code, script.opened) == (1, [])
    assert Path("out.jsonl").read_bytes() == before
    retried = run("ask", "videos", "why?", "-o", "out.jsonl", "--retry-failed")
    assert retried.exit_code == 0
    assert [(record["path"], record["ok"]) for record in lines("out.jsonl")] == [
        (f"videos/{name}.mp4", True) for name in "abc"
    ]
    assert len(script.asked) == 1


def test_other_questions_and_settings_are_other_records(run: Run, script: Script, folder: Path) -> None:
    for arguments in (["why?"], ["how?"], ["why?", "--ratio", "0.2"], ["why?"]):
        assert run("ask", "videos", *arguments, "-o", "out.jsonl").exit_code == 0
    assert len(script.asked) == 9
    assert len({record["key"] for record in lines("out.jsonl")}) == 9
    (folder / "a.mp4").write_bytes(b"longer")
    told = run("ask", "videos", "why?", "-o", "out.jsonl").stderr
    assert len(script.asked) == 10
    assert "7 records of other files, questions, models or settings: left alone" in told


def test_new_files_take_their_places(run: Run, script: Script, folder: Path) -> None:
    run("ask", "videos", "why?", "-o", "out.jsonl")
    (folder / "ab.mp4").write_bytes(b"x")
    run("ask", "videos", "why?", "-o", "out.jsonl", "--unordered")
    assert [Path(record["path"]).stem for record in lines("out.jsonl")] == ["a", "b", "c", "ab"]
    run("ask", "videos", "why?", "-o", "out.jsonl")
    assert [Path(record["path"]).stem for record in lines("out.jsonl")] == ["a", "ab", "b", "c"]


def test_overwrite_begins_anew(run: Run, script: Script, folder: Path) -> None:
    Path("out.jsonl").write_text("something else\n")
    assert run("ask", "videos", "why?", "-o", "out.jsonl").exit_code == 2
    assert Path("out.jsonl").read_text() == "something else\n"
    assert run("ask", "videos", "why?", "-o", "out.jsonl", "--overwrite").exit_code == 0
    assert len(lines("out.jsonl")) == 3


def test_records_are_not_written_over_what_they_are_made_from(run: Run, script: Script, folder: Path) -> None:
    Path("list.txt").write_text("videos/a.mp4\n")
    Path("questions.csv").write_text("why?\n")
    Path("rows.jsonl").write_text('{"media": "videos/a.mp4", "question": "why?"}\n')
    os.link("videos/b.mp4", "other.jsonl")
    before = {
        path: Path(path).read_bytes() for path in ("videos/a.mp4", "list.txt", "rows.jsonl", "questions.csv")
    }
    for arguments in (
        ("videos/a.mp4", "why?", "-o", "videos/a.mp4", "--format", "jsonl"),
        ("videos", "why?", "-o", "other.jsonl"),
        ("--from", "list.txt", "why?", "-o", "list.txt", "--format", "jsonl"),
        ("--manifest", "rows.jsonl", "-o", "rows.jsonl"),
        ("videos", "--questions", "questions.csv", "-o", "questions.csv"),
    ):
        result = run("ask", *arguments, "--overwrite")
        assert result.exit_code == 2, arguments
        assert "is one of the files that are read" in result.stderr
    assert {path: Path(path).read_bytes() for path in before} == before
    assert script.opened == []


def test_fail_fast_stops_at_the_first_failure(run: Run, script: Script, folder: Path) -> None:
    script.replies = {"b.mp4": MediaError("no frame decodes")}
    result = run("ask", "videos", "why?", "-o", "out.jsonl", "--fail-fast")
    assert result.exit_code == 1
    assert [Path(record["path"]).stem for record in lines("out.jsonl")] == ["a", "b"]
    assert "1 ok, 1 failed, 1 not asked" in result.stderr


def test_fail_fast_needs_no_model_for_what_is_known_to_fail(run: Run, script: Script, folder: Path) -> None:
    (folder / "bb.mp4").touch()
    result = run("ask", "videos", "why?", "-o", "out.jsonl", "--fail-fast")
    assert result.exit_code == 1
    assert [Path(record["path"]).stem for record in lines("out.jsonl")] == ["bb"]
    assert "0 ok, 1 failed, 3 not asked" in result.stderr
    assert script.opened == []


def test_what_is_finished_is_written_where_a_run_breaks_off(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of its turn, since its turn does not come."""
    from seats_cli.cli import batch_run

    def broken(terminal: Any, request: Any, items: Any, screen: Any) -> Any:
        from seats_cli.batch.records import failure

        yield failure(items[2], batch_run._asking(request), MediaError("no frame"))
        raise RuntimeError("broken")

    monkeypatch.setattr(batch_run, "_records", broken)
    assert run("ask", "videos", "why?", "-o", "out.jsonl").exit_code == 1
    assert [Path(record["path"]).stem for record in lines("out.jsonl")] == ["c"]


def test_nothing_is_written_behind_half_a_record(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for a moment."""
    from seats_cli.batch.output import JsonLines
    from seats_cli.cli import batch_run

    def records(terminal: Any, request: Any, items: Any, screen: Any) -> Any:
        from seats_cli.batch.records import failure

        for item in (items[1], items[2], items[0]):
            yield failure(item, batch_run._asking(request), MediaError("no frame"))

    calls: list[Any] = []

    def append(self: JsonLines, record: Any) -> None:
        calls.append(record)
        self.write(b"{}\n")

    class Full:
        """A disk on which half a record has room."""

        def __init__(self, stream: Any) -> None:
            self.stream, self.writes = stream, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

        def write(self, record: bytes) -> int:
            self.writes += 1
            if self.writes > 1:
                raise OSError(28, "No space left on device")
            return int(self.stream.write(record[:1]))

    opened = JsonLines._opened
    monkeypatch.setattr(JsonLines, "_opened", lambda self: Full(opened(self)))

    monkeypatch.setattr(batch_run, "_records", records)
    monkeypatch.setattr(JsonLines, "append", append)
    assert run("ask", "videos", "why?", "-o", "out.jsonl").exit_code == 1
    assert len(calls) == 1


def test_an_end_without_a_way_back_leaves_no_empty_file(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while libraries are imported."""
    from seats_cli.cli import batch_run

    def leaving(terminal: Any, *_: Any) -> int:
        assert Path("out.jsonl").exists()
        terminal.leave()
        assert not Path("out.jsonl").exists()
        return 130

    monkeypatch.setattr(batch_run, "_ask_all", leaving)
    assert run("ask", "videos", "why?", "-o", "out.jsonl").exit_code == 130


def test_the_retry_command_is_what_was_typed(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "b b.mp4").touch()
    typed = ["ask", "videos", "why not?", "-o", "out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["seats", *typed])
    told = run(*typed).stderr
    assert "to try the failed ones again: seats ask videos 'why not?' -o out.jsonl --retry-failed" in told
    typed = [
        "ask",
        "--from",
        "-",
        "why?",
        "-o",
        "listed.jsonl",
    ]  # an empty file stands for what came on stdin
    monkeypatch.setattr(sys, "argv", ["seats", *typed])
    told = run(*typed, input="videos/b b.mp4\n").stderr
    assert "again: ... | seats ask --from - 'why?' -o listed.jsonl --retry-failed" in told


def test_failures_are_told_a_few_times_and_kept_always(run: Run, script: Script, folder: Path) -> None:
    script.replies = {f"{number}.mp4": MediaError("no frame decodes") for number in range(9)}
    for name in script.replies:
        (folder / name).write_bytes(b"x")
    result = run("ask", "videos", "why?", "-o", "out.jsonl")
    assert result.stderr.count("error: ") == 5
    assert "warning: more questions fail; the records say why" in result.stderr
    assert sum(not record["ok"] for record in lines("out.jsonl")) == 9


def test_losses_stand_in_the_records(run: Run, script: Script, folder: Path) -> None:
    script.warnings = ["only the first 3 s decode"]
    result = run("ask", "videos", "why?", "-o", "out.jsonl")
    assert "3 with losses" in result.stderr
    assert "warning" not in result.stderr.replace("see warnings", "")
    assert {tuple(record["warnings"]) for record in lines("out.jsonl")} == {("only the first 3 s decode",)}
    told = run("ask", "videos", "why?").stderr
    assert "warning: videos/a.mp4: only the first 3 s decode" in told


def test_what_is_wrong_for_every_file_is_wrong_before_the_first(
    run: Run, script: Script, folder: Path
) -> None:
    script.setup_error = UsageError("the preset is of another model")
    result = run("ask", "videos", "why?", "-o", "out.jsonl")
    assert (result.exit_code, script.read) == (2, [])
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["videos", "why?", "--jsonl", "--format", "csv"], "contradict each other"),
        (["videos", "why?", "--overwrite"], "give -o FILE"),
        (["videos", "why?", "--retry-failed"], "give -o FILE"),
        (["videos", "why?", "-o", "o", "--overwrite", "--retry-failed"], "choose one"),
        (["videos", "why?", "--shard", "0/2"], "part I of N"),
        (["videos", "why?", "--shard", "3/2"], "part I of N"),
        (["videos", "why?", "--json", "-o", "out.jsonl"], "--json and --output are two forms"),
        (["videos", "why?", "--compare", "--jsonl"], "--compare and --jsonl are two forms"),
        (["videos", "--json", "--questions", "q.txt"], "--json is about one question, not --questions"),
        (["-", "why?", "--from", "-"], "stdin can be read once only"),
        (["videos", "why?", "-0"], "says how a list is written"),
        (["--manifest", "rows.jsonl", "videos", "why?"], "names files and questions itself"),
        (["--questions", "none.txt"], "files are missing"),
        (["videos", "--questions", "none.txt"], "cannot read the questions"),
        (["videos", "why?", "--questions", "q.txt"], "with --questions every argument is a file"),
        (["--from", "none.txt", "why?"], "cannot read the list"),
        (["videos", "why?", "-o", "none/out.jsonl"], "there is no folder none"),
        (["videos", "why?", "--format", "xml"], "'xml' is not one of"),
    ],
)
def test_wrong_usage(run: Run, script: Script, folder: Path, arguments: list[str], expected: str) -> None:
    result = run("ask", *arguments)
    assert result.exit_code == 2, result.stderr
    assert expected in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert script.opened == []


def test_every_record_is_as_the_schema_says(run: Run, script: Script, folder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    schema = json.loads((ROOT / "docs" / "answers.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    script.replies = {"b.mp4": MediaError("no frame decodes"), "c.mp4": "and then..."}
    run("ask", "videos", "gone.mp4", "why?", "-o", "out.jsonl")
    found = lines("out.jsonl")
    assert [record["ok"] for record in found] == [True, False, True, False]
    for record in found:
        checker.validate(record)
        assert set(record) == set(schema["properties"])  # nothing that the schema does not speak of
    for part in ("error", "tokens", "timing"):
        known = set(schema["properties"][part]["properties"])
        assert {key for record in found for key in record[part] or ()} == known
    for broken in ({**found[0], "ok": False}, {**found[1], "error": None}, {**found[0], "key": "a"}):
        assert not checker.is_valid(broken)


def test_forms_are_those_of_the_room() -> None:
    from seats_cli.batch import output
    from seats_cli.cli import batch_options

    assert set(batch_options.FORMS) == {form.split()[0] for form in output.FORMS}


def test_limits_reach_the_session_from_both_ways(run: Run, script: Script, folder: Path) -> None:
    from seats_cli.media import NO_LIMITS, Limits

    typed = "size=2GB, duration=90m,pixels=50M,frames=none,seconds=5,stall=7"
    expected = Limits(2e9, 5400.0, 50e6, None, 5.0, 7.0)
    assert run("ask", "videos", "why?", "--limits", typed).exit_code == 0
    assert script.limits == expected
    assert run("ask", "videos/a.mp4", "why?", env={"SEATS_LIMITS": typed}).exit_code == 0
    assert script.limits == expected
    run("ask", "videos", "why?", "--limits", "none")
    assert script.limits == NO_LIMITS
    run("ask", "videos", "why?", "--limits", "size=1GiB")
    assert script.limits == Limits(size_bytes=2.0**30)
    run("ask", "videos", "why?")
    assert script.limits == Limits()


@pytest.mark.parametrize(
    "typed",
    [
        "size",
        "weight=1",
        "size=",
        "size=1h",
        "duration=1GB",
        "size=1..2",
        "frames=-1",
        "stall=0",
        "size=1,size=2",
    ],
)
def test_limits_that_are_none(run: Run, script: Script, folder: Path, typed: str) -> None:
    result = run("ask", "videos", "why?", "--limits", typed)
    assert result.exit_code == 2
    assert "--limits" in result.stderr
    assert script.opened == []


def test_the_limits_that_are_shown_are_those_of_the_room() -> None:
    from seats_cli.cli import batch_options
    from seats_cli.media import Limits

    shown = batch_options.LimitsOption.__metadata__[0].show_default
    assert Limits(**batch_options.parse_limits(shown)) == Limits()


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_says_how_far_how_fast_how_long_and_where() -> None:
    clock, err = Clock(), io.StringIO()
    terminal = Terminal()
    terminal.err = err
    screen = BatchScreen(terminal, 4, keeps_errors=True, on_stdout=False, now=clock)
    screen.begin()
    tokens = {"kept": 0.1}
    for number in range(2):
        clock.now += 9.0
        screen.stage(f"{number}.mp4", "encode_video", 1, 2)
        screen.record(
            {
                "path": f"{number}.mp4",
                "start_s": None,
                "end_s": None,
                "ok": True,
                "tokens": tokens,
                "warnings": [],
            }
        )
    assert screen.status() == "2 of 4 answers, 400 clips/h, 18 s left, 10.0% of tokens kept"
    said = err.getvalue().splitlines()  # a line after ten seconds, then one every thirty
    assert said == ["1 of 4 answers, 200 clips/h, 54 s left, 10.0% of tokens kept; at 1.mp4: encode video"]
    for _ in range(29):
        clock.now += 1.0
        screen.stage("2.mp4", "read", 1, 2)
    assert len(err.getvalue().splitlines()) == 1
    clock.now += 1.0
    screen.stage("2.mp4", "read", 1, 2)
    assert len(err.getvalue().splitlines()) == 2


@pytest.mark.parametrize("to_file", [True, False])
def test_a_bar_is_in_the_way_only_of_answers_on_the_same_screen(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch, to_file: bool
) -> None:
    asked, bar = [], Terminal.bar

    def noted(self: Terminal, total: int, *, beside_answers: bool) -> Any:
        asked.append((total, beside_answers))
        return bar(self, total, beside_answers=beside_answers)

    monkeypatch.setattr(Terminal, "bar", noted)
    assert run("ask", "videos", "why?", *(["-o", "out.jsonl"] if to_file else [])).exit_code == 0
    assert asked == [(3, not to_file)]


def test_what_waits_for_its_turn_is_kept_when_a_run_is_stopped(
    run: Run, script: Script, folder: Path
) -> None:
    (folder / "z.mp4").touch()  # known to fail before anything runs
    script.replies = {"b.mp4": KeyboardInterrupt()}
    assert run("ask", "videos", "why?", "-o", "out.jsonl").exit_code == 130
    assert [Path(record["path"]).stem for record in lines("out.jsonl")] == ["a", "z"]
    script.replies = {}
    run("ask", "videos", "why?", "-o", "out.jsonl")
    assert [Path(record["path"]).stem for record in lines("out.jsonl")] == ["a", "b", "c", "z"]


@pytest.mark.parametrize("reader_is_gone", [False, True])
def test_what_waits_for_its_turn_reaches_a_pipe_when_a_run_is_stopped(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch, reader_is_gone: bool
) -> None:
    (folder / "z.mp4").touch()
    script.replies = {"b.mp4": KeyboardInterrupt()}
    whole = Stream.append

    def append(self: Stream, record: Any) -> None:
        if reader_is_gone and not record["ok"]:
            raise BrokenPipeError
        whole(self, record)

    monkeypatch.setattr(Stream, "append", append)
    result = run("ask", "videos", "why?", "--jsonl")
    assert result.exit_code == 130
    written = [Path(json.loads(line)["path"]).stem for line in result.stdout.splitlines()]
    assert written == (["a"] if reader_is_gone else ["a", "z"])
    assert "interrupted" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_run_and_says_so(run: Run, script: Script, folder: Path) -> None:
    result = run("ask", "videos", "why?", "-o", "/dev/full", "--format", "jsonl")
    assert result.exit_code == 1
    assert "cannot write: No space left on device" in result.stderr
    assert len(script.asked) == 1


def test_streams_that_are_closed_are_nobodys(tmp_path: Path) -> None:
    """An output must not get the number of a closed stream, to which libraries may print."""
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    command = f"{sys.executable} -m seats_cli ask . why -o answers.jsonl <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=120).returncode == 1
    (line,) = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["error"]["kind"] == "media_format"
