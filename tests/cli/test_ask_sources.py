"""`seats ask` over many files: where files and questions come from."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Run, Script, lines
from seats_cli.batch.output import CSV_HEAD

ROOT = Path(__file__).parents[2]


def test_lists_come_from_stdin_or_a_file(run: Run, script: Script, folder: Path) -> None:
    names = b"# mine\nvideos/c.mp4\n\nvideos/a.mp4\n"
    result = run("ask", "-", "why?", "--jsonl", input=names)
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == [
        "videos/c.mp4",
        "videos/a.mp4",
    ]
    result = run("ask", "videos/b.mp4", "why?", "--from", "-", "--jsonl", input=names)
    assert [Path(json.loads(line)["path"]).stem for line in result.stdout.splitlines()] == ["b", "c", "a"]
    Path("list.txt").write_bytes(names)
    assert len(run("ask", "--from", "list.txt", "why?", "--jsonl").stdout.splitlines()) == 2
    result = run("ask", "-0", "-", "why?", "--jsonl", input=b"videos/a.mp4\0#b.mp4\0")
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == ["videos/a.mp4", "#b.mp4"]
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (
            b"videos/a.mp4\nvideos/b.mp4\n",
            ["-0"],
            "the list - has a name a line, and no NUL\nhint: leave -0 out",
        ),
        (b"videos/a.mp4\0videos/b.mp4\0", [], "the names in the list - end with NUL\nhint: -0 reads it"),
        ("videos/a.mp4\n".encode("utf-16"), [], "the list - is UTF-16\nhint: write it as UTF-8"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0", [], "- is no list of names\nhint: a list is text"),
    ],
)
def test_a_list_of_the_other_form_is_told(
    run: Run, script: Script, folder: Path, data: bytes, options: list[str], expected: str
) -> None:
    result = run("ask", *options, "-", "why?", "--jsonl", input=data)
    assert (result.exit_code, result.stdout) == (2, "")
    assert expected in result.stderr
    assert run("ask", "-0", "-", "why?", "--jsonl", input=b"videos/a.mp4").exit_code == 0


def test_a_batch_leaves_stdin_alone(script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seats_cli.cli.app import run as command_line

    class Unread(io.StringIO):
        def read(self, *_: object) -> str:
            raise AssertionError("stdin was read")

        readline = read

    monkeypatch.setattr(sys, "stdin", Unread())
    assert command_line(["ask", "videos", "why?", "-o", "out.jsonl"]) == 0


def test_several_questions_read_a_clip_once(run: Run, script: Script, folder: Path) -> None:
    Path("questions.txt").write_text("# two\nwhy?\nhow?\n")
    result = run("ask", "videos", "--questions", "questions.txt", "-o", "out.csv")
    assert result.exit_code == 0
    assert [Path(path).stem for path in script.read] == ["a", "b", "c"]
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text(), newline="")))
    assert [(row["path"], row["question"]) for row in rows] == [
        (f"videos/{name}.mp4", text) for name in "abc" for text in ("why?", "how?")
    ]
    text = run("ask", "videos/a.mp4", "--questions", "-", input="why?\n\nhow?\n").stdout
    assert text == "==> videos/a.mp4: why? <==\na red star\n==> videos/a.mp4: how? <==\na red star\n"


@pytest.mark.parametrize("option", [["--glob", "*.mp4"], ["--recursive"]])
def test_options_about_folders_without_one_are_told(
    run: Run, script: Script, folder: Path, option: list[str]
) -> None:
    told = "--recursive and --glob are about folders, and none is named"
    for command in (["videos/a.mp4"], ["-", "--jsonl"]):
        result = run("ask", *command, "why?", *option, input="videos/a.mp4\n")
        assert result.exit_code == 0
        assert result.stderr.count(told) == 1
    for command in (["videos"], ["vidoes"]):
        assert told not in run("ask", *command, "why?", *option).stderr


def test_an_output_is_none_of_its_folder_s_files(run: Run, script: Script, folder: Path) -> None:
    command = ("ask", "videos", "why?", "--glob", "*", "-o", "videos/out.jsonl")
    assert run(*command).exit_code == 0
    again = run(*command)
    assert again.exit_code == 0, again.stderr
    assert len(Path("videos/out.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_manifest_has_a_question_a_row(run: Run, script: Script, folder: Path, form: str) -> None:
    rows: list[dict[str, Any]] = [
        {"media": "a.mp4", "question": "why?", "id": "one"},
        {"media": "a.mp4", "question": "how?", "start": 1, "end": 2.5},
        {"media": "b.mp4", "question": 'which, "one"?', "options": ["red", "blue"]},
    ]
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows[2]["options"] = "red|blue"
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["media", "question", "id", "start", "end", "options"])
            writer.writeheader()
            writer.writerows(rows)
    result = run("ask", "--manifest", path, "-o", "out.jsonl")
    assert result.exit_code == 0, result.stderr
    found = lines("out.jsonl")
    assert [record["question"].split("\n")[0] for record in found] == ["why?", "how?", 'which, "one"?']
    assert "B. blue" in found[2]["question"]
    assert (found[0]["id"], found[1]["start_s"], found[1]["end_s"]) == ("one", 1.0, 2.5)
    assert [(options.start_s, options.end_s) for _, _, options in script.asked][1] == (1.0, 2.5)
    assert run("ask", "--manifest", path, "why?").exit_code == 2
    if form == "jsonl":
        data = path.read_bytes().replace(
            b'"media": "', b'"media": "videos/'
        )  # from here, not from its folder
        piped_in = run("ask", "--manifest", "-", "--jsonl", input=data)
        again = [json.loads(line) for line in piped_in.stdout.splitlines()]
        for name in ("id", "question", "start_s", "end_s", "answer"):
            expected = [record[name] for record in found]
            assert [record[name] for record in again][:1] == expected[:1]
            assert name == "id" or [record[name] for record in again] == expected  # else made from the path
        assert [record["path"] for record in again] == ["videos/a.mp4", "videos/a.mp4", "videos/b.mp4"]


def test_shards_divide_the_files(run: Run, script: Script, folder: Path) -> None:
    found = []
    for part in ("1/2", "2/2"):
        out = f"out.{part[0]}.jsonl"
        assert run("ask", "videos", "why?", "--shard", part, "-o", out).exit_code == 0
        found.append([Path(record["path"]).stem for record in lines(out)])
    assert found == [["a", "c"], ["b"]]


def test_files_that_cannot_be_opened_need_no_model(run: Run, script: Script, folder: Path) -> None:
    result = run("ask", "gone.mp4", "https://example.org/a.mp4", "why?", "--jsonl")
    assert result.exit_code == 1
    assert [json.loads(line)["error"]["kind"] for line in result.stdout.splitlines()] == ["media_missing"] * 2
    assert script.opened == []


def test_json_takes_folders_as_it_takes_files(run: Run, script: Script, folder: Path) -> None:
    document = json.loads(run("ask", "videos", "why?", "--json").stdout)
    assert [result["media"]["path"] for result in document["results"]] == [
        f"videos/{name}.mp4" for name in "abc"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-", "why", "--jsonl"), "the list names no file"),
        (("a.mp4", "what is said?", "--questions", "q.txt", "--jsonl"), "every argument is a file"),
        (("-", "--questions", "-", "--jsonl"), "stdin can be read once only"),
        (("a.mp4", "--questions", "-", "--jsonl"), "stdin holds no questions"),
        (("a.mp4", "why", "-o", "-"), "-o - is no file"),
        (("--manifest", "m.jsonl", "--recursive", "--jsonl"), "a manifest has none"),
    ],
)
def test_what_would_ask_nothing_or_something_else(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"broken")
    (tmp_path / "q.txt").write_text("why\n")
    (tmp_path / "m.jsonl").write_text('{"media": "a.mp4", "question": "why"}\n')
    command = [sys.executable, "-m", "seats_cli", "ask", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert said in done.stderr


def test_rows_of_one_question_with_ids_of_their_own_have_a_record_each() -> None:
    from seats_cli.batch.resume import with_keys
    from seats_cli.batch.sources import Item

    items = [Item("a.mp4", "why", name) for name in ("one", "two", "one")]
    keys = [item.key for item in with_keys(items, {"model": "tiny"}, {})]
    assert keys[0] == keys[2] != keys[1]
    quantised = with_keys(items[:1], {"model": "tiny", "quantize": "4bit"}, {})
    assert quantised[0].key != keys[0]


def test_an_empty_folder_stops_no_others_and_a_closed_one_is_a_failure(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if os.path.normpath(path) == "locked":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    for name in ("empty", "locked"):
        (folder.parent / name).mkdir()
    beside = run("ask", "empty", "videos", "why?", "-o", "out.jsonl")
    assert (beside.exit_code, len(lines("out.jsonl"))) == (0, 3)
    assert "warning: empty is a folder without media files" in beside.stderr
    monkeypatch.setattr(os, "scandir", refused)
    locked = run("ask", "locked", "videos", "why?", "-o", "locked.jsonl")
    assert locked.exit_code == 1
    assert [(record["path"], record["ok"]) for record in lines("locked.jsonl")] == [
        ("locked", False),
        *((f"videos/{name}.mp4", True) for name in "abc"),
    ]
    assert "error: cannot look into the folder locked: Permission denied" in locked.stderr
    alone = run("ask", "empty", "why?")
    assert alone.exit_code != 0
    assert "error: empty is a folder without media files" in alone.stderr


def test_a_shard_without_a_file_leaves_an_empty_one(run: Run, script: Script, folder: Path) -> None:
    assert run("ask", "videos", "why?", "--shard", "4/4", "-o", "out.jsonl").exit_code == 0
    assert Path("out.jsonl").read_bytes() == b""
    for _ in range(2):  # it can be gone on with
        assert run("ask", "videos", "why?", "--shard", "4/4", "-o", "out.csv").exit_code == 0
        assert Path("out.csv").read_text() == CSV_HEAD
    assert script.opened == []
