"""Small annotation files in the benchmarks' published formats become manifests that can be asked."""

import csv
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from seats_cli.errors import UsageError
from seats_cli.lab.convert import BENCHMARKS, convert, missing_media
from seats_cli.lab.manifest import Sample, read_manifest
from seats_cli.lab.scoring import score

PUBLISHED: dict[str, Any] = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "annotations").glob("*.json"))
}
VIDEOMME_NESTED = PUBLISHED.pop("videomme-nested")
WORLDSENSE, DAILY_OMNI, OMNIVIDEOBENCH, VIDEOMME, LVOMNIBENCH = (PUBLISHED[name] for name in BENCHMARKS)
COLOURS = ["A. red", "B. blue", "C. green", "D. black"]


def as_json(folder: Path, document: Any, name: str = "annotations.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def manifest(folder: Path, name: str, document: Any, media_dir: Path | None = None) -> list[Sample]:
    """What is evaluated in the end: converted, written, read again."""
    records = convert(name, as_json(folder, document), media_dir)
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_manifest(path)


def test_every_benchmark_is_tested_here() -> None:
    assert PUBLISHED.keys() == BENCHMARKS.keys()


EXPECTED = {
    "worldsense": [
        ("dvOkwKAs-task0", "videos/dvOkwKAs.mp4", "Audio Recognition", "B", "A flute."),
        ("dvOkwKAs-task1", "videos/dvOkwKAs.mp4", "Object Counting", "D", "4."),
        ("aaBBccDD-task0", "videos/aaBBccDD.mp4", "Audio Recognition", "A", "red"),
    ],
    "daily-omni": [
        ("G_VTkkb34gw-0", "Videos/G_VTkkb34gw/G_VTkkb34gw_video.mp4", "AV Event Alignment", "C", "green"),
        ("G_VTkkb34gw-1", "Videos/G_VTkkb34gw/G_VTkkb34gw_video.mp4", "Reasoning", "A", "red"),
    ],
    "omnivideobench": [
        ("video_1-0", "videos/video_1.mp4", "counting", "C", "2"),
        ("video_1-1", "videos/video_1.mp4", "spatial understanding", "D", "Top right"),
    ],
    "videomme": [
        ("001-1", "data/fFjv93ACGo8.mp4", "Counting Problem", "C", "Plates."),
        ("001-2", "data/fFjv93ACGo8.mp4", "Counting Problem", "D", "All of them are."),
    ],
    "lvomnibench": [("video_0-0", "videos/video_0.mp4", "Event Understanding", "D", "black")],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_annotations_become_samples(tmp_path: Path, name: str) -> None:
    samples = manifest(tmp_path, name, PUBLISHED[name])
    found = [
        (
            s.id,
            str(s.media.relative_to(tmp_path)),
            s.family,
            s.answers[0],
            s.options["ABCD".index(s.answers[0])],
        )
        for s in samples
    ]
    assert found == EXPECTED[name]
    for sample in samples:
        assert len(sample.options) == 4
        assert f"\n{sample.answers[0]}. " in sample.question
        assert score(sample, f"The answer is {sample.answers[0]}.").correct
        others = set("ABCD") - {*sample.answers}
        assert not any(score(sample, letter).correct for letter in others)


def test_questions_are_asked_as_published(tmp_path: Path) -> None:
    (sample,) = manifest(tmp_path, "videomme", VIDEOMME_NESTED)
    assert sample.question == (
        "How many jars?\nA. 4.\nB. 9.\nC. 5.\nD. 13.\n"
        "Answer with the option's letter from the given choices directly."
    )


# ---- variants of the formats


def rows_of(name: str) -> list[dict[str, Any]]:
    """The benchmark as rows, a question each, as its tables have them."""
    if name == "worldsense":
        return [
            {"index": 0, "video": video, "video_path": f"./videos/{video}.mp4", "duration": "<1min"} | task
            for video, entry in WORLDSENSE.items()
            for key, task in entry.items()
            if key.startswith("task")
        ]
    if name == "omnivideobench":
        videos = OMNIVIDEOBENCH
        return [{"video": f"videos/{v['video']}.mp4"} | q for v in videos for q in v["questions"]]  # type: ignore  # JSON
    return list(PUBLISHED[name])


def essence(records: Any) -> list[tuple[str, ...]]:
    return [(r["media"], r["question"], r["answer"], r["family"], *r["options"]) for r in records]


@pytest.mark.parametrize("kind", ["json", "jsonl", "lines.json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_tables_hold_the_same(tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = essence(convert(name, as_json(tmp_path, PUBLISHED[name])))
    rows, path = rows_of(name), tmp_path / f"table.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind.endswith(("jsonl", "lines.json")):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "parquet":
        path.write_bytes(b"PAR1 and what only pyarrow reads PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake_parquet({path: rows}))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            names = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(file, names, delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)  # lists as Python writes them, as pandas does
    assert essence(convert(name, path)) == expected


def fake_parquet(files: Mapping[Path, list[dict[str, Any]]]) -> types.ModuleType:
    module = types.ModuleType("pyarrow.parquet")

    def read_table(path: Path) -> Any:
        return types.SimpleNamespace(to_pylist=lambda: files[path])

    module.read_table = read_table  # type: ignore[attr-defined]
    return module


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match="pyarrow is not installed") as caught:
        convert("videomme", path)
    assert caught.value.hint == "pip install pyarrow"


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="cannot read"):
        convert("videomme", path)


def test_daily_omni_as_an_object_of_entries(tmp_path: Path) -> None:
    entries = {f"Entry_{number}": row for number, row in enumerate(DAILY_OMNI)}
    plain = essence(convert("daily-omni", as_json(tmp_path, DAILY_OMNI)))
    assert essence(convert("daily-omni", as_json(tmp_path, entries))) == plain


def test_keys_of_entries_are_no_videos(tmp_path: Path) -> None:
    entry = {key: value for key, value in DAILY_OMNI[0].items() if key != "video_id"}
    with pytest.raises(UsageError, match=r"Entry_0: no key video_id"):
        convert("daily-omni", as_json(tmp_path, {"Entry_0": entry}))


def test_video_mme_by_its_address_or_its_number(tmp_path: Path) -> None:
    (record,) = convert("videomme", as_json(tmp_path, VIDEOMME_NESTED))
    assert record["media"] == str(tmp_path / "data" / "fFjv93ACGo8.mp4")
    there = touch(tmp_path / "by-number" / "001.mp4")
    (record,) = convert("videomme", as_json(tmp_path, VIDEOMME_NESTED), there.parent)
    assert record["media"] == str(there)
    nameless = [{key: value for key, value in VIDEOMME_NESTED[0].items() if key != "url"}]
    (record,) = convert("videomme", as_json(tmp_path, nameless))
    assert record["media"] == str(tmp_path / "data" / "001.mp4")


def test_keys_in_any_case_and_options_without_letters(tmp_path: Path) -> None:
    row = {key.upper(): value for key, value in LVOMNIBENCH[0].items()}
    row["OPTIONS"] = ["red", "blue", "green", "black"]
    plain = essence(convert("lvomnibench", as_json(tmp_path, LVOMNIBENCH)))
    assert essence(convert("lvomnibench", as_json(tmp_path, [row]))) == plain


@pytest.mark.parametrize("answer", ["D", "d", "(D)", "D.", "black", "Black.", "D. black"])
def test_answers_as_letter_or_text(tmp_path: Path, answer: str) -> None:
    row = LVOMNIBENCH[0] | {"correct_option": answer}
    (record,) = convert("lvomnibench", as_json(tmp_path, [row]))
    assert record["answer"] == "D"


@pytest.mark.parametrize(
    "options", [dict(zip("ABCD", COLOURS, strict=True)), "\n".join(COLOURS), str(COLOURS)]
)
def test_options_as_an_object_or_a_text(tmp_path: Path, options: Any) -> None:
    (record,) = convert("lvomnibench", as_json(tmp_path, [LVOMNIBENCH[0] | {"options": options}]))
    assert record["options"] == ["red", "blue", "green", "black"]


def test_options_as_json_in_a_cell(tmp_path: Path) -> None:
    cell = json.dumps(["\N{GRINNING FACE}", "b"])  # escaped as a pair, which Python reads as two characters
    row = LVOMNIBENCH[0] | {"options": cell, "correct_option": "A"}
    (record,) = convert("lvomnibench", as_json(tmp_path, [row]))
    assert record["options"] == ["\N{GRINNING FACE}", "b"]


def test_ids_that_repeat_are_not_used(tmp_path: Path) -> None:
    rows = [
        LVOMNIBENCH[0] | {"question_id": number, "video_id": f"video_{number // 2}"} for number in range(4)
    ]
    assert [r["id"] for r in convert("lvomnibench", as_json(tmp_path, rows))] == ["0", "1", "2", "3"]
    rows[3]["question_id"] = 2
    ids = [r["id"] for r in convert("lvomnibench", as_json(tmp_path, rows))]
    assert ids == ["video_0-0", "video_0-1", "video_1-0", "video_1-1"]


def test_families_that_differ_in_case_are_one(tmp_path: Path) -> None:
    types_ = ("Context understanding", "Context  Understanding", " ", None)
    rows = [DAILY_OMNI[0] | {"Type": name} for name in types_]
    families = [r["family"] for r in convert("daily-omni", as_json(tmp_path, rows))]
    assert families == ["Context understanding"] * 2 + ["other"] * 2


# ---- where the videos are


LAYOUTS = {
    "worldsense": ["dvOkwKAs.mp4", "videos/dvOkwKAs.mp4", "dvOkwKAs.MKV", "unzipped/part3/dvOkwKAs.webm"],
    "daily-omni": [
        "G_VTkkb34gw/G_VTkkb34gw_video.mp4",
        "Videos/G_VTkkb34gw/G_VTkkb34gw_video.mp4",
        "flat/G_VTkkb34gw_video.mp4",
        "flat/G_VTkkb34gw.mp4",
    ],
    "omnivideobench": ["video_1.mp4", "videos/video_1.mp4", "x/y/video_1.mov"],
    "videomme": [
        "fFjv93ACGo8.mp4",
        "data/fFjv93ACGo8.MP4",
        "video/fFjv93ACGo8.mkv",
        "zips/01/fFjv93ACGo8.mp4",
    ],
    "lvomnibench": ["video_0.mp4", "videos/video_0.mp4", "a/b/c/video_0.avi"],
}


@pytest.mark.parametrize(("name", "place"), [(name, p) for name, places in LAYOUTS.items() for p in places])
def test_videos_are_found(tmp_path: Path, name: str, place: str) -> None:
    there = touch(tmp_path / "media" / place)
    touch(there.with_suffix(".wav"))  # subtitles and sound beside it are no videos
    touch(there.with_suffix(".srt"))
    touch(there.with_name("x" + there.name))
    records = list(convert(name, as_json(tmp_path, PUBLISHED[name]), tmp_path / "media"))
    assert records[0]["media"] == str(there)
    missing = ["aaBBccDD.mp4"] if name == "worldsense" else []
    assert [Path(path).name for path in missing_media(records)] == missing


def test_names_with_a_folder_and_a_suffix(tmp_path: Path) -> None:
    there = touch(tmp_path / "media" / "videos" / "video_1.mp4")
    path = as_json(tmp_path, rows_of("omnivideobench"))
    for media_dir in (there.parent, there.parent.parent):
        assert {r["media"] for r in convert("omnivideobench", path, media_dir)} == {str(there)}


def test_folders_in_names_count_from_the_annotations(tmp_path: Path) -> None:
    there = touch(tmp_path / "part1" / "video_0.mp4")
    path = as_json(tmp_path, [LVOMNIBENCH[0] | {"video_id": "part1/video_0"}])
    assert next(convert("lvomnibench", path))["media"] == str(there)


def test_the_usual_kind_of_file_comes_first(tmp_path: Path) -> None:
    for suffix in (".webm", ".mp4", ".mkv"):
        touch(tmp_path / "media" / f"video_0{suffix}")
    (record,) = convert("lvomnibench", as_json(tmp_path, LVOMNIBENCH), tmp_path / "media")
    assert record["media"].endswith("video_0.mp4")


def test_names_are_told_apart_by_case(tmp_path: Path) -> None:
    touch(tmp_path / "media" / "deep" / "DVoKWkas.mp4")
    records = convert("worldsense", as_json(tmp_path, WORLDSENSE), tmp_path / "media")
    assert next(records)["media"] == str(tmp_path / "media" / "dvOkwKAs.mp4")


def test_two_videos_of_one_name_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "media" / "480p" / "video_0.mp4")
    touch(tmp_path / "media" / "720p" / "video_0.mp4")
    path = as_json(tmp_path, LVOMNIBENCH)
    with pytest.raises(UsageError, match=r"two videos are named video_0: .*480p.* and .*720p"):
        convert("lvomnibench", path, tmp_path / "media")
    (record,) = convert("lvomnibench", path, tmp_path / "media" / "720p")
    assert missing_media([record]) == []


def test_without_a_folder_only_the_usual_places_are_looked_at(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "video_0.mp4")
    path = as_json(tmp_path, LVOMNIBENCH)
    records = list(convert("lvomnibench", path))
    assert missing_media(records) == [str(tmp_path / "videos" / "video_0.mp4")]
    there = touch(tmp_path / "videos" / "video_0.mkv")
    assert next(convert("lvomnibench", path))["media"] == str(there)


def test_missing_videos_are_kept_and_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = as_json(tmp_path, VIDEOMME)
    for media_dir in (Path("not-there-yet"), tmp_path / "not-there-yet"):
        records = list(convert("videomme", path, media_dir))
        assert len(records) == 2
        assert missing_media(records) == [str(tmp_path / "not-there-yet" / "fFjv93ACGo8.mp4")]
    (tmp_path / "download" / "data").mkdir(parents=True)
    records = list(convert("videomme", path, tmp_path / "download"))
    assert missing_media(records) == [str(tmp_path / "download" / "data" / "fFjv93ACGo8.mp4")]


# ---- what is no such file


def without(key: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in LVOMNIBENCH[0].items() if name != key}]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (without("question"), r"entry 1: no key question \(question\); keys found: .*video_id"),
        (without("options"), r"no key options \(options\)"),
        (without("correct_option"), r"no key correct_option or answer \(answer\)"),
        (without("video_id"), r"no key video_id or video \(video\)"),
        (without("question_type"), r"no key question_type \(family\)"),
        ([LVOMNIBENCH[0], LVOMNIBENCH[0] | {"question": " "}], "entry 2: the question is blank"),
        ([LVOMNIBENCH[0] | {"correct_option": None}], "entry 1: the answer is blank"),
        ([LVOMNIBENCH[0] | {"video_id": ""}], "the video is blank"),
        ([LVOMNIBENCH[0] | {"correct_option": "E"}], "the answer 'E' is none of the options"),
        ([LVOMNIBENCH[0] | {"correct_option": "D. red"}], "the answer 'D. red' is none of the options"),
        ([LVOMNIBENCH[0] | {"options": ["A. red"]}], "options are"),
        ([LVOMNIBENCH[0] | {"options": ["red", ""]}], "options are"),
        ([LVOMNIBENCH[0] | {"options": "['A. red' 'B. blue' 'C. x' 'D. black']"}], "options are"),
        ([LVOMNIBENCH[0] | {"options": 3}], "options are 3"),
        ([{"video_id": "video_0", "questions": ["why?"]}], "entry 1, question 1: 'why\\?' is no object"),
        ([], "has no questions"),
        ({}, "has no questions"),
        (["text"], "neither a list of objects nor an object of objects"),
        ({"data": LVOMNIBENCH}, r"entry 1: no key .* \(video\); keys found: data"),
        ("text", "neither a list of objects nor an object of objects"),
        (WORLDSENSE, r"'?dvOkwKAs, task0: no key options"),
    ],
)
def test_rows_that_are_not_understood_are_told(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        convert("lvomnibench", as_json(tmp_path, document))  # before the first record is taken
    assert str(tmp_path / "annotations.json") in caught.value.message


def test_the_hint_says_what_a_question_has(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert("daily-omni", as_json(tmp_path, VIDEOMME))
    assert caught.value.hint == "a question of Daily-Omni has: video_id, question, choice, answer, type"
    with pytest.raises(UsageError, match=r"dvOkwKAs: no key question .*; keys found: domain, video_id"):
        convert("worldsense", as_json(tmp_path, {"dvOkwKAs": {"domain": "Music"}}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "neither UTF-8 text nor Parquet"),
        (b"{", "is not JSON: "),
        (b"", "has no questions"),
        (b'{"a": 1}\n{"b": }', "is not JSON: line 2: "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)
def test_files_that_are_no_annotations(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        convert("videomme", path)


def test_paths_and_names_that_are_wrong(tmp_path: Path) -> None:
    path = as_json(tmp_path, VIDEOMME)
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        convert("videomme", tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        convert("videomme", tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        convert("videomme", path, path)
    with pytest.raises(UsageError, match="no such benchmark: 'video-mme'") as caught:
        convert("video-mme", path)
    assert "worldsense, daily-omni, omnivideobench, videomme, lvomnibench" in (caught.value.hint or "")


def test_importing_needs_nothing_heavy() -> None:
    import subprocess

    program = (
        "import sys\nimport seats_cli.lab.convert, seats_cli.lab.manifest, seats_cli.lab.scoring\n"
        "heavy = {'torch', 'numpy', 'av', 'transformers', 'pyarrow', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
