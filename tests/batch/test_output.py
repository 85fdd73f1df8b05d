"""The files of records: what a killed run leaves, what is never touched, and the order of lines."""

import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seats_cli.batch import lines, output
from seats_cli.batch.output import COLUMNS, InOrder, Stream, form_of, open_output
from seats_cli.batch.records import Asking, Record, failure
from seats_cli.batch.resume import in_order, with_keys
from seats_cli.batch.sources import Item
from seats_cli.errors import MediaError, UsageError

ANSWERS = ("a star", 'two\nlines, "quoted"', "naïve ☃", "", "\r\n,", "a\rb", '"', "x" * 300, "y" * 140_000)


def record(key: str, answer: str | None = None, path: str = "clips/a.mp4") -> Record:
    """An answer, or a failure without one."""
    made = failure(Item(path, "what\nis it?", key=key), Asking(), MediaError('no "frame"', hint="hm"))
    if answer is None:
        return made
    tokens = {"text": 1, "video": 2, "audio": 3, "kept": 0.1, "generated": 4, "finish_reason": "stop"}
    timing = {"read_s": 0.5, "prefill_s": 0.1, "generate_s": 0.2}
    return {**made, "ok": True, "answer": answer, "error": None, "tokens": tokens, "timing": timing}


def rows(path: Path) -> list[dict[str, Any]]:
    """What a reader of the file finds."""
    if path.suffix == ".csv":
        csv.field_size_limit(10**6)
        return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


class Warnings(list[str]):
    """Collects what is warned of."""

    def __call__(self, message: str) -> None:
        self.append(message)


@pytest.fixture
def warned() -> Warnings:
    return Warnings()


FORMS = ("jsonl", "csv")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_back_and_known(tmp_path: Path, form: str, warned: Warnings) -> None:
    path = tmp_path / f"out.{form}"
    records = [record(f"k{number}", answer) for number, answer in enumerate((*ANSWERS, None))]
    with open_output(path, form, warn=warned) as file:
        for each in records:
            file.append(each)
            assert len(rows(path)) == len(file.known)  # out at once
    found = rows(path)
    assert [row["answer"] or "" for row in found] == [*ANSWERS, ""]
    if form == "jsonl":
        assert found == records
    else:
        assert list(found[0]) == list(COLUMNS)
        assert found[-1]["error.message"] == 'no "frame"'
        assert found[0]["tokens.kept"] == "0.1"
    before = path.read_bytes()
    with open_output(path, form, warn=warned) as file:
        assert file.known == {each["key"]: each["ok"] for each in records}
    assert path.read_bytes() == before
    assert warned == []


@pytest.mark.parametrize("form", FORMS)
def test_wherever_a_record_was_cut_off_the_rest_is_kept(tmp_path: Path, form: str, warned: Warnings) -> None:
    path = tmp_path / f"out.{form}"
    first, second = record("a", ANSWERS[1]), record("b", ANSWERS[1])
    with open_output(path, form, warn=warned) as file:
        file.append(first)
        start = path.stat().st_size
        file.append(second)
    whole = path.read_bytes()
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        warned.clear()
        with open_output(path, form, warn=warned) as file:
            known = dict(file.known)
            for each in (first, second):
                if each["key"] not in known:
                    file.append(each)
        assert path.read_bytes() == whole, length
        assert ("a" in known) == (length >= start - (form == "jsonl")), length
        assert len(warned) <= 1


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_blank_lines_move_nothing(tmp_path: Path, form: str, at: int, warned: Warnings) -> None:
    path = tmp_path / f"a.{form}"
    with open_output(path, form, warn=warned) as file:
        for key in "ba":
            file.append(record(key, "yes"))
        file.append(record("c"))
    lines_there = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines_there[:at], "\n", *lines_there[at:]]))
    with open_output(path, form, warn=warned) as file:
        assert file.put_in_order(["a", "b", "c"])
        assert file.forget_failures([Item("clips/c.mp4", "why?", key="c")]) == 1
        file.append(record("d", "yes"))
    path.write_text("\n".join(line for line in path.read_text().split("\n") if line))
    assert [row["key"] for row in rows(path)] == ["a", "b", "d"]


@pytest.mark.parametrize("form", FORMS)
def test_failures_of_a_file_that_was_mended_are_forgotten(
    tmp_path: Path, form: str, warned: Warnings
) -> None:
    """Their keys are others, but for the model and the options; failures of others, and answers, stay."""
    path = tmp_path / f"a.{form}"
    asking, item = Asking(), Item("clips/a.mp4", "what\nis it?", start_s=1.0)
    (now,) = with_keys([item], asking.model, asking.asked)
    same = now.key[:8]
    stay = (same + "answered", same + "another file", "settings" + now.key[8:])
    with open_output(path, form, warn=warned) as file:
        file.append({**record(same + "before"), "start_s": 1.0})
        file.append({**record(stay[0], "yes"), "start_s": 1.0})
        file.append({**record(stay[1], path="clips/b.mp4"), "start_s": 1.0})
        file.append({**record(stay[2]), "start_s": 1.0})
    with open_output(path, form, warn=warned) as file:
        assert file.forget_failures([now]) == 1
        assert tuple(file.known) == stay
    assert tuple(row["key"] for row in rows(path)) == stay


def test_a_record_that_was_cut_down_by_somebody_stays(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "k", "ok": false}\n')
    with open_output(path, "jsonl", warn=warned) as file:
        assert file.forget_failures([Item("a.mp4", "why?", key="another")]) == 0
        assert file.known == {"k": False}


def test_a_key_begins_with_the_model_and_the_options() -> None:
    items = [Item("a.mp4", "why?"), Item("b.mp4", "how?")]
    one, two = with_keys(items, {"model": "tiny"}, {"ratio": 0.1})
    other, _ = with_keys(items, {"model": "tiny"}, {"ratio": 0.2})
    assert one.key[:8] == two.key[:8] != other.key[:8]
    assert one.key[8:] != two.key[8:]
    assert len(one.key) == 24


@pytest.mark.skipif(os.name != "posix", reason="needs locks")
def test_an_empty_file_is_taken_away_while_nobody_else_can_have_it(
    tmp_path: Path, warned: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, unlink, tried = tmp_path / "a.jsonl", Path.unlink, []

    def watched(self: Path, **options: Any) -> None:
        with pytest.raises(UsageError, match="another run"):
            open_output(path, "jsonl", warn=warned)
        tried.append(1)
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    with open_output(path, "jsonl", warn=warned):
        pass
    assert tried == [1]
    assert not path.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "content",
    [
        b'{"media": "a.mp4", "question": "why?", "answer": "so"}\n',
        b"# notes\n",
        b"notes without an end",
        b'{"key": "a", "method": "seats"}\n',
        b"path,answer\na.mp4,so\n",
        b"\x00\x01\x02 a film \xff\n\xfe",
        b"\nmy only notes",
        b'\n"a,b\nlots,1\n',
    ],
)
def test_files_of_anything_else_are_left_alone(
    tmp_path: Path, form: str, content: bytes, warned: Warnings
) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no record"):
        open_output(path, form, warn=warned)
    assert path.read_bytes() == content


def test_a_line_of_something_else_in_the_middle_is_no_torn_tail(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    with open_output(path, "jsonl", warn=warned) as file:
        file.append(record("a", "so"))
    path.write_bytes(path.read_bytes() + b"notes\n" + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(UsageError, match="line 2 is no record"):
        open_output(path, "jsonl", warn=warned)
    assert path.read_bytes() == before


def test_overwriting_empties_whatever_is_there(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("notes\n")
    with open_output(path, "jsonl", warn=warned, overwrite=True) as file:
        file.append(record("a", "so"))
    assert [row["key"] for row in rows(path)] == ["a"]


def test_text_is_for_reading_and_cannot_be_gone_on_with(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.txt"
    with open_output(path, "text", warn=warned) as file:
        file.append(record("a", "so"))
        file.append(record("b"))
    assert path.read_text() == "==> clips/a.mp4 <==\nso\n"
    with pytest.raises(UsageError, match="text cannot be gone on with"):
        open_output(path, "text", warn=warned)
    with open_output(path, "text with questions", warn=warned, overwrite=True) as file:
        file.append(record("a", "so"))
    assert path.read_text() == "==> clips/a.mp4: what\nis it? <==\nso\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")
def test_two_runs_cannot_write_one_file(tmp_path: Path, warned: Warnings) -> None:
    path = tmp_path / "out.jsonl"
    program = (
        "import sys; from pathlib import Path; from seats_cli.batch.output import open_output; "
        "open_output(Path(sys.argv[1]), 'jsonl', warn=print, overwrite=True)"
    )

    def another() -> str:
        done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
        return done.stderr

    with open_output(path, "jsonl", warn=warned) as file:
        file.append(record("b", "so"))
        file.append(record("a", "so"))
        assert "another run is writing" in another()
        assert file.put_in_order(["a", "b"])
        assert "another run is writing" in another()  # also the file that took its place
    assert [row["key"] for row in rows(path)] == ["a", "b"]  # and --overwrite of the other emptied nothing
    assert another() == ""


@pytest.mark.parametrize("form", FORMS)
def test_failures_are_forgotten_and_nothing_else(tmp_path: Path, form: str, warned: Warnings) -> None:
    path = tmp_path / f"out.{form}"
    link = tmp_path / "link"
    link.symlink_to(path)
    with open_output(link, form, warn=warned) as file:
        for key, answer in (("a", "one"), ("b", None), ("c", None), ("d", "two")):
            file.append(record(key, answer))
    os.chmod(path, 0o640)
    with open_output(link, form, warn=warned) as file:
        assert file.forget_failures([Item("x", "y", key=key) for key in "ab"]) == 1
        assert file.known == {"a": True, "c": False, "d": True}
        file.append(record("b", "three"))
        assert file.put_in_order(["a", "b", "d"])
        assert not file.put_in_order(["a", "b", "d"])
    assert [(row["key"], row["answer"] or None) for row in rows(path)] == [
        ("a", "one"),
        ("c", None),  # of another run: it keeps its place
        ("b", "three"),
        ("d", "two"),
    ]
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link", path.name]


@given(st.permutations("abcdef"), st.lists(st.sampled_from("uvw"), max_size=4), st.randoms())
def test_lines_share_their_places_in_order(ours: list[str], others: list[str], rng: random.Random) -> None:
    keys: list[str | None] = [*ours, *others, None]
    rng.shuffle(keys)
    order = in_order(keys, "abcdef")
    placed = keys if order is None else [keys[place] for place in order]
    assert [key for key in placed if key is not None and key in "abcdef"] == list("abcdef")
    for place, key in enumerate(keys):
        if key is None or key not in "abcdef":
            assert placed[place] == key
    assert in_order(placed, "abcdef") is None


@given(st.permutations(range(8)))
def test_records_are_passed_on_in_order_as_soon_as_may_be(arrival: list[int]) -> None:
    written: list[int] = []
    order = InOrder([str(n) for n in range(8)], lambda record: written.append(int(record["key"])))
    for count, number in enumerate(arrival, 1):
        order.put({"key": str(number)})
        there = set(arrival[:count])
        assert written == [n for n in range(8) if all(m in there for m in range(n + 1))]


def test_what_waits_is_written_when_a_run_ends_early() -> None:
    written: list[str] = []
    order = InOrder("abcd", lambda record: written.append(record["key"]))
    for key in "dba":
        order.put({"key": key})
    assert written == ["a", "b"]
    order.flush()
    assert written == ["a", "b", "d"]


def test_names_that_are_no_unicode_are_escaped_and_read_back(tmp_path: Path, warned: Warnings) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    path = tmp_path / "out.jsonl"
    with open_output(path, "jsonl", warn=warned) as file:
        file.append(record("a", "so", path=name))
    assert rows(path)[0]["path"] == name
    for form in ("csv", "text"):
        with open_output(tmp_path / form, form, warn=warned) as file:
            file.append(record("a", "so", path=name))
        assert b"caf\\udce9.mp4" in (tmp_path / form).read_bytes()


def test_a_stream_gets_each_record_at_once() -> None:
    pieces: list[str] = []
    with Stream("csv", pieces.append) as stream:
        stream.append(record("a", "so"))
        assert stream.known == {}
    assert pieces == [output.CSV_HEAD, output.as_csv(record("a", "so"))]


def test_the_form_is_what_was_asked_or_what_the_name_says() -> None:
    assert form_of(None, None) == "text"
    assert form_of(Path("a.csv"), None) == "csv"
    assert form_of(Path("a.TXT"), None) == "text"
    assert form_of(Path("a.out"), None) == "jsonl"
    assert form_of(Path("a.csv"), "jsonl") == "jsonl"


def test_the_columns_are_those_of_a_record() -> None:
    flat = []
    for key, value in record("a", "so").items():
        inner = {"error": record("b")["error"]}.get(key, value)
        flat += [f"{key}.{name}" for name in inner] if isinstance(inner, dict) else [key]
    assert flat == list(COLUMNS)


def test_a_file_that_another_run_put_in_order_meanwhile_is_opened_anew(
    tmp_path: Path, warned: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run takes the old file's place between our opening and our lock: ours would be nobody's."""
    path, anew = tmp_path / "out.jsonl", tmp_path / "anew.jsonl"
    for each, key in ((path, "old"), (anew, "new")):
        with open_output(each, "jsonl", warn=warned) as file:
            file.append(record(key, "so"))
    real = lines.lock

    def late(stream: Any) -> bool:
        if anew.exists():
            os.replace(anew, path)
        return real(stream)

    monkeypatch.setattr(lines, "lock", late)
    with open_output(path, "jsonl", warn=warned) as file:
        assert file.known == {"new": True}
        file.append(record("more", "so"))
    assert [row["key"] for row in rows(path)] == ["new", "more"]
