"""Manifests: what a line becomes, and that a wrong one is told with its place and key."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from seats_cli.demo.questions import STYLES
from seats_cli.errors import UsageError
from seats_cli.lab.manifest import ASK_FOR_LETTER, read_manifest, with_options, without_letters
from seats_cli.lab.scoring import score

LINE = {"media": "a.mp4", "question": "what is said?", "answer": "snake fish"}


def write(folder: Path, *lines: dict[str, Any] | str) -> Path:
    path = folder / "manifest.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_a_plain_line(tmp_path: Path) -> None:
    (sample,) = read_manifest(write(tmp_path, LINE))
    assert (sample.question, sample.answers, sample.options) == ("what is said?", ("snake fish",), ())
    assert (sample.family, sample.clip, sample.start_s, sample.end_s) == ("all", "a.mp4", None, None)
    assert sample.media == tmp_path / "a.mp4"
    assert sample.id.startswith("a-")


def test_a_full_line(tmp_path: Path) -> None:
    line = LINE | {
        "id": 7,
        "family": " speech ",
        "answer": ["one", "two"],
        "start": 1,
        "end": 2.5,
        "note": "x",
    }
    (sample,) = read_manifest(write(tmp_path, line))
    assert (sample.id, sample.family, sample.answers) == ("7", "speech", ("one", "two"))
    assert (sample.start_s, sample.end_s, sample.clip) == (1.0, 2.5, "a.mp4#t=1,2.5")


def test_null_is_as_good_as_absent(tmp_path: Path) -> None:
    line = LINE | dict.fromkeys(("options", "family", "id", "start", "end"))
    assert read_manifest(write(tmp_path, line)) == read_manifest(write(tmp_path, LINE))


def test_options_are_listed_and_asked_for(tmp_path: Path) -> None:
    (sample,) = read_manifest(write(tmp_path, LINE | {"options": ["A. red", "B. blue"], "answer": "blue"}))
    assert sample.question == f"what is said?\nA. red\nB. blue\n{ASK_FOR_LETTER}"
    assert sample.options == ("red", "blue")
    assert score(sample, "B").correct
    assert not score(sample, "A").correct


def test_a_question_that_lists_its_options_stays_as_it_is(tmp_path: Path) -> None:
    options = ["red moon", "blue", "(green)", "cyan?"]
    for style in STYLES:  # as the questions of `seats demo` have them
        asked = style.format(*options, q="which?")
        assert with_options(asked, options) == asked
        assert with_options(asked.upper(), options) == asked.upper()
    listed = with_options("which?", options)
    assert with_options(listed, options) == listed
    assert with_options("which? a) red moon b) blue c) (green)", options).endswith(ASK_FOR_LETTER)
    assert with_options("a) red moonlight b) blue", ["red moon", "blue"]).endswith(ASK_FOR_LETTER)
    assert with_options("which?", ()) == "which?"


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (["A. red", "B. blue"], ("red", "blue")),
        (["A.red", "B.3", "C. ."], ("red", "3", ".")),
        (["(a) red", "(b) blue"], ("red", "blue")),
        (["A) red", "b: blue", "C、green"], ("red", "blue", "green")),
        (["A. red", "B. blue", "green", "D. cyan"], ("red", "blue", "green", "cyan")),
        (["A. Lincoln", "G. Washington", "T. Jefferson"], ("A. Lincoln", "G. Washington", "T. Jefferson")),
        (["B. red", "A. blue"], ("B. red", "A. blue")),
        (["A dog", "B side"], ("A dog", "B side")),
        (["3", "4"], ("3", "4")),
        ([" red ", "blue"], ("red", "blue")),
    ],
)
def test_letters_are_taken_off(given: list[str], texts: tuple[str, ...]) -> None:
    assert without_letters(given) == texts


def test_letters_put_on_come_off_again() -> None:
    rng = random.Random(0)
    for _ in range(300):
        texts = tuple("".join(rng.choice("ab .3-") for _ in range(5)).strip() or "x" for _ in range(4))
        style = rng.choice(("{0}. {1}", "{0}) {1}", "({0}) {1}"))
        lettered = [style.format(letter, text) for letter, text in zip("ABCD", texts, strict=True)]
        assert without_letters(lettered) == texts


def test_clips_are_the_same_file_and_range(tmp_path: Path) -> None:
    elsewhere = tmp_path.parent / "b.mp4"
    media = ["x/a.mp4", "./x/../x/a.mp4", str(tmp_path / "x" / "a.mp4"), "../b.mp4", str(elsewhere)]
    lines = [LINE | {"media": name, "id": i} for i, name in enumerate(media)]
    lines += [LINE | {"media": "x/a.mp4", "id": 10 + i, "start": s} for i, s in enumerate((0, 3.25, 3.25))]
    lines += [LINE | {"media": "x/a.mp4", "id": 20, "end": 3725.123456}]
    samples = read_manifest(write(tmp_path, *lines))
    assert {sample.media for sample in samples[:3]} == {tmp_path / "x" / "a.mp4"}
    clips = [sample.clip for sample in samples]
    assert clips[:3] == [str(Path("x/a.mp4"))] * 3
    assert clips[3:5] == [str(elsewhere)] * 2
    assert [clip.partition("#")[2] for clip in clips[5:]] == ["t=0", "t=3.25", "t=3.25", "t=,3725.123456"]


def test_made_ids_outlast_other_lines_and_another_folder(tmp_path: Path) -> None:
    before = read_manifest(write(tmp_path, LINE))[0].id
    lines = [LINE | {"question": "who?"}, LINE | {"start": 1}, LINE, LINE | {"media": "b/a.mp4"}]
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(write(tmp_path, *lines), moved / "other.jsonl")
    ids = [sample.id for sample in read_manifest(moved / "other.jsonl")]
    assert ids[2] == before
    assert len(set(ids)) == 4


def test_a_manifest_is_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, LINE, LINE | {"media": str(tmp_path / "a.mp4"), "question": "who?"})
    monkeypatch.chdir(tmp_path)
    sample, absolute = read_manifest(Path("manifest.jsonl"))
    assert (sample.media, absolute.media) == (Path("a.mp4"), tmp_path / "a.mp4")
    assert sample.clip == absolute.clip == "a.mp4"


def test_byte_order_mark_blank_lines_and_odd_separators(tmp_path: Path) -> None:
    question = "one\u2028two\u0085three"  # line ends to str.splitlines, text to JSON
    text = "\ufeff" + json.dumps(LINE | {"question": question}, ensure_ascii=False) + "\r\n\r\n   \n"
    (tmp_path / "m.jsonl").write_bytes(text.encode())
    (sample,) = read_manifest(tmp_path / "m.jsonl")
    assert sample.question == question


def test_answers_are_needed_only_where_they_are_scored(tmp_path: Path) -> None:
    path = write(tmp_path, {"media": "a.mp4", "question": "why?"}, LINE, LINE | {"id": 1, "answer": []})
    assert [sample.answers for sample in read_manifest(path, need_answers=False)] == [(), ("snake fish",), ()]
    with pytest.raises(UsageError, match=r'manifest.jsonl:1: no key "answer"'):
        read_manifest(path)


def test_numbers_are_answers_too(tmp_path: Path) -> None:
    (sample,) = read_manifest(write(tmp_path, LINE | {"answer": [3, "three"]}))
    assert sample.answers == ("3", "three")


WRONG: list[tuple[Any, str]] = [
    ("{", ":2: not JSON: .*"),
    ("[" * 100_000, ":2: not JSON"),
    ("[1, 2]", ":2: a list, not an object with keys"),
    ({"question": "q", "answer": "a"}, ':2: no key "media"'),
    ({"media": "a.mp4", "answer": "a"}, ':2: no key "question"'),
    ({"media": "a.mp4", "question": "q"}, ':2: no key "answer"'),
    (LINE | {"media": ""}, ':2: "media" must be text that is not empty, not ""'),
    (LINE | {"media": "a\0.mp4"}, ':2: "media" must be a path'),
    (LINE | {"question": 3}, ':2: "question" must be text that is not empty, not 3'),
    ('{"media": "a.mp4", "question": "\\ud83d", "answer": "a"}', ':2: "question" must be valid Unicode'),
    (LINE | {"answer": {"a": 1}}, ':2: "answer" must be a text or a list of texts'),
    (LINE | {"answer": [""]}, ':2: "answer" must be a text or a list of texts'),
    (LINE | {"answer": []}, ':2: "answer" must be'),
    (LINE | {"answer": True}, ':2: "answer" must be a text or a list of texts, not true'),
    (LINE | {"options": "red"}, ':2: "options" must be a list of 2 to 26 texts, in a CSV cell with'),
    (LINE | {"options": ["red"]}, ':2: "options" must be a list of 2 to 26 texts'),
    (LINE | {"options": ["red", 3]}, ':2: "options" must be a list of 2 to 26 texts, not 3'),
    (LINE | {"options": ["x"] * 27}, ':2: "options" must be a list of 2 to 26 texts'),
    (LINE | {"options": ["x", "y"]}, ':2: "answer" must be a letter from A to B, or the text of one option'),
    (LINE | {"options": ["x", "y"], "answer": ["A", "C"]}, ':2: "answer" must be a letter .*, not "C"'),
    (LINE | {"options": ["x", "X"], "answer": "x"}, ':2: "answer" must be a letter'),
    (LINE | {"family": 1}, ':2: "family" must be text'),
    (LINE | {"id": ""}, ':2: "id" must be text'),
    (LINE | {"id": True}, ':2: "id" must be text'),
    (LINE | {"start": "1:90"}, ':2: "start" must be a number of seconds, 0 or more, or "mm:ss", not "1:90"'),
    (LINE | {"start": "-1"}, ':2: "start" must be a number of seconds'),
    (LINE | {"end": "soon"}, ':2: "end" must be a number of seconds'),
    (LINE | {"start": -1}, ':2: "start" must be a number of seconds'),
    (LINE | {"start": 10**400}, ':2: "start" must be a number of seconds'),
    (LINE | {"end": float("nan")}, ':2: "end" must be a number of seconds'),
    (LINE | {"start": 3, "end": 3}, r':2: "end" must be later than start \(3\), not 3.0'),
    (LINE | {"end": 0}, ':2: "end" must be later than start'),
    ({"media": "a.mp4", "question": "q", "anwser": "a"}, ':2: unknown key "anwser"'),
    (LINE | {"optoins": ["x", "y"]}, ':2: unknown key "optoins"'),
    (LINE | {"Family": "x"}, ':2: unknown key "Family"'),
    (LINE | {"strat": 3}, ':2: unknown key "strat"'),
    (LINE, ":2: the id 'a-.*' is already that of line 1"),
    (LINE | {"id": "first"}, ":2: the id 'first' is already that of line 1"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_line_is_told(tmp_path: Path, line: Any, message: str) -> None:
    first = LINE | ({"id": "first"} if "first" in message else {})
    with pytest.raises(UsageError, match=message) as caught:
        read_manifest(write(tmp_path, first, line))
    assert caught.value.message.startswith(str(tmp_path / "manifest.jsonl"))
    assert caught.value.hint or "must be" in caught.value.message


@pytest.mark.parametrize(
    "key", ["duration", "video_id", "question_id", "question_type", "url", "medium", "uid", "and"]
)
def test_other_keys_are_no_slips(tmp_path: Path, key: str) -> None:
    assert read_manifest(write(tmp_path, LINE | {key: "x"})) == read_manifest(write(tmp_path, LINE))


def test_a_slip_beside_the_right_key_is_just_another_key(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path, LINE | {"answers": ["x"]}))[0].answers == ("snake fish",)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no samples"), (b"\n \n", "holds no samples"), (b"\xff\xfe{}", "not UTF-8")],
)
def test_files_that_are_no_manifest(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_manifest(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the manifest .*: No such file"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"cannot read the manifest .*: Is a directory"):
        read_manifest(tmp_path)


def test_a_csv_says_the_same_as_json_lines(tmp_path: Path) -> None:
    rows = [
        {
            "media": "a.mp4",
            "question": "who, then?",
            "answer": ["the host", "a woman"],
            "start": 1.5,
            "end": 3,
        },
        {
            "media": "b.mp4",
            "question": "which\ncar?",
            "options": ["red", "blue"],
            "answer": "B",
            "family": "x",
        },
        {"media": "b.mp4", "question": "how many?", "answer": "2", "id": "n"},
    ]
    lines, table = tmp_path / "m.jsonl", tmp_path / "m.CSV"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.write_text(
        "media, question,answer,options,family,id,start,end,note\n"
        'a.mp4,"who, then?",the host|a woman,,,,0:01.5,3,"any, thing"\n'
        "\n"
        'b.mp4,"which\ncar?",B,red | blue,x,,,,\n'
        "b.mp4,how many?,2,,,n\n"
    )
    assert read_manifest(table) == read_manifest(lines)


def test_a_part_in_minutes_is_that_in_seconds(tmp_path: Path) -> None:
    (sample,) = read_manifest(write(tmp_path, LINE | {"start": "1:02:03.5", "end": "90:00"}))
    assert (sample.start_s, sample.end_s) == (3723.5, 5400.0)


def test_what_was_read_already_counts_from_the_path_it_is_given() -> None:
    data = json.dumps({"media": "sub/a.mp4", "question": "why?"}).encode()
    (sample,) = read_manifest(Path("stdin"), need_answers=False, data=data)
    assert sample.media == Path("sub/a.mp4")
    with pytest.raises(UsageError, match=r"^stdin:1: not JSON"):
        read_manifest(Path("stdin"), data=b"media,question")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("media,question\na.mp4,why?,so\n", "m.csv:2: 3 cells under 2 heads"),
        ('media,question\na.mp4,"why?\n', "m.csv:2: not CSV"),
        ("media,question\n,why?\n", 'm.csv:2: no key "media"'),
        ("media,question,start\na.mp4,why?,soon\n", '"start" must be a number of seconds'),
        ("media,qestion\na.mp4,why?\n", 'did you mean "question"?'),
        ("media;question;start\na.mp4;why?;1,5\n", "m.csv:1: the columns stand between semicolons"),
        ("media\tquestion\na.mp4\twhy?\n", "m.csv:1: the columns stand between tabs"),
        ("media,question\n", "holds no samples"),
        ("", "holds no samples"),
    ],
)
def test_a_csv_that_cannot_be_asked(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(UsageError) as met:
        read_manifest(path, need_answers=False)
    assert expected in f"{met.value} {met.value.hint}"
