"""The file of records: what a killed run leaves, and what is never touched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seats_cli.errors import DeviceError, MediaError, PlanError, UsageError
from seats_cli.lab.manifest import Sample
from seats_cli.lab.records import Record, RecordFile, failure, has_failed, is_unplanned
from seats_cli.lab.settings import Setting


def line(key: str, **rest: Any) -> Record:
    """A record short enough to read."""
    return {"key": key, "method": "seats", "answer": "naïve ☃", **rest}


class Warnings(list[str]):
    """Collects what is warned of."""

    def __call__(self, message: str) -> None:
        self.append(message)


@pytest.fixture
def warned() -> Warnings:
    return Warnings()


def test_what_is_written_is_there_at_once_and_known_to_the_next_run(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path, warn=warned) as file:
        file.append(line("a", n=1))
        assert [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] == [
            line("a", n=1)
        ]
        file.append(line("b"))
    with RecordFile(path, warn=warned) as file:
        assert file.known == {"a": line("a", n=1), "b": line("b")}
        file.append(line("a", n=2))
    with RecordFile(path, warn=warned) as file:
        assert file.known["a"] == line("a", n=2)  # the later line counts
    assert warned == []


def test_wherever_a_line_was_cut_off_the_rest_is_kept(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path, warn=warned) as file:
        file.append(line("a"))
        file.append(line("b"))
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for length in range(second + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        warned.clear()
        with RecordFile(path, warn=warned) as file:
            assert list(file.known) == ["a"]
            file.append(line("b"))
        assert path.read_bytes() == whole
        assert len(warned) == 1
        assert "cut off" in warned[0]


def test_a_first_line_that_was_cut_off(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    for text in ('{"k', '{"key": "abc", "method": "sea'):
        path.write_text(text)
        with RecordFile(path, warn=warned) as file:
            assert file.known == {}
            file.append(line("a"))
        assert json.loads(path.read_text(encoding="utf-8")) == line("a")


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(line("a")))
    with RecordFile(path, warn=warned) as file:
        file.append(line("b"))
    with RecordFile(path, warn=warned) as file:
        assert list(file.known) == ["a", "b"]
    assert warned == []


@pytest.mark.parametrize(
    "content",
    [
        b'{"media": "a.mp4", "question": "why?", "answer": "so"}\n',
        b"# notes\n",
        b"notes without an end",
        b'{"key": "a", "method": "seats"}\n[1, 2]\n',
        b'{"key": "a"}\n',
        b"\x00\x01\x02 a film \xff\n\xfe",
    ],
)
def test_files_of_anything_else_are_left_alone(tmp_path: Path, content: bytes, warned: Warnings) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no record"):
        RecordFile(path, warn=warned)
    assert path.read_bytes() == content


def test_places_that_cannot_be_written(tmp_path: Path, warned: Warnings) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        RecordFile(tmp_path, warn=warned)
    with pytest.raises(UsageError, match="no folder"):
        RecordFile(tmp_path / "none" / "out.jsonl", warn=warned)
    if os.path.isdir("/proc/self"):
        with pytest.raises(UsageError, match="cannot write"):
            RecordFile(Path("/proc/out.jsonl"), warn=warned)


def test_a_run_that_finds_nothing_leaves_no_file(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path, warn=warned):
        assert path.exists()
    assert not path.exists()
    path.touch()
    with RecordFile(path, warn=warned):
        pass
    assert path.exists()  # it was there before


def test_a_pipe_is_written_to_and_never_read(tmp_path: Path, warned: Warnings) -> None:
    with RecordFile(Path("/dev/null"), warn=warned) as file:
        file.append(line("a"))
        assert file.known == {}


def test_a_run_says_what_it_is_in_its_first_record(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path, warn=warned) as file:
        file.note_run("k", {"model": {"name": "tiny"}})
        file.append(line("a"))
        file.append(line("b"))
    first, second = (json.loads(text) for text in path.read_text(encoding="utf-8").splitlines())
    assert first["run"] == {"key": "k", "model": {"name": "tiny"}}
    assert second == line("b")
    with RecordFile(path, warn=warned) as file:
        assert file.known == {"a": line("a"), "b": line("b")}
        assert file.runs == {"k": first["run"]}
        file.note_run("k", {"model": {"name": "tiny"}})
        file.append(line("c"))
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[2]) == line("c")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")
def test_two_runs_cannot_write_one_file(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    program = (
        "import sys; from pathlib import Path; from seats_cli.lab.records import RecordFile; "
        "RecordFile(Path(sys.argv[1]), warn=print)"
    )
    with RecordFile(path, warn=warned):
        done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "another run is writing" in done.stderr


def test_a_plan_that_cannot_be_is_no_failure() -> None:
    sample = Sample("1", Path("a.mp4"), "why?", ("so",), (), "all", "a.mp4")
    no_plan, no_file, no_room, bug = (
        failure(sample, Setting("seats", 0.1), error)
        for error in (
            PlanError("too small"),
            MediaError("broken"),
            DeviceError("full"),
            ZeroDivisionError("x"),
        )
    )
    assert is_unplanned(no_plan)
    assert not has_failed(no_plan)
    for record in (no_file, no_room, bug):
        assert has_failed(record)
        assert not is_unplanned(record)
    assert bug["error"]["message"] == "unexpected ZeroDivisionError: x"
    assert (no_plan["answer"], no_plan["correct"], no_plan["expected"]) == (None, None, ["so"])
