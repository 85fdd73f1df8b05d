"""Folders, lists and shards: every file once, in order, whatever lies beside it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seats_cli.batch.sources import Item, check_file, files_in, listed, nothing_in, questions_in, shard_of
from seats_cli.errors import MediaMissing, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.mp4, a.MKV, notes.txt, .hidden.mp4, sub/c.wav, sub/deep/d.jpg, .cache/e.mp4, and links."""
    root = tmp_path / "videos"
    for name in ("b.mp4", "a.MKV", "notes.txt", ".hidden.mp4", "sub/c.wav", "sub/deep/d.jpg", ".cache/e.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def below(folder: Path, found: list[str]) -> list[str]:
    return [os.path.relpath(path, folder) for path in found]


def test_a_folder_is_its_media_files_in_order(folder: Path) -> None:
    found = files_in(str(folder), recursive=False, globs=())
    assert below(folder, found) == ["a.MKV", "b.mp4"]
    found = files_in(str(folder), recursive=True, globs=())
    assert below(folder, found) == ["a.MKV", "b.mp4", "sub/c.wav", "sub/deep/d.jpg"]
    assert found[0].startswith(str(folder))


def test_globs_choose_by_name_or_by_path(folder: Path) -> None:
    def names(*globs: str) -> list[str]:
        return below(folder, files_in(str(folder), recursive=True, globs=globs))

    assert names("*.txt") == ["notes.txt"]
    assert names("*.wav", "b*") == ["b.mp4", "sub/c.wav"]
    assert names("sub/*") == ["sub/c.wav", "sub/deep/d.jpg"]


def test_a_folder_without_media_says_where_some_may_be(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    def told(place: Path, *globs: str, recursive: bool) -> str:
        assert files_in(str(place), recursive=recursive, globs=globs) == []
        return nothing_in(str(place), recursive=recursive, globs=globs).message

    assert told(tmp_path / "empty", recursive=True).endswith("is a folder without media files")
    assert "--recursive looks into its folders" in told(tmp_path, recursive=False)
    assert "files that match *.flac" in told(folder, "*.flac", recursive=True)


def test_folders_that_cannot_be_read_stand_for_their_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir, closed = os.scandir, {str(folder / "sub"), str(tmp_path / "own")}

    def refused(path: str) -> Any:
        if os.path.normpath(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    (tmp_path / "own").mkdir()
    monkeypatch.setattr(os, "scandir", refused)
    assert below(folder, files_in(str(folder), recursive=True, globs=("*.mp4",))) == ["b.mp4", "sub"]
    assert files_in(str(tmp_path / "own"), recursive=False, globs=()) == [str(tmp_path / "own")]
    with pytest.raises(MediaMissing, match=r"cannot look into the folder .*sub: Permission denied"):
        check_file(str(folder / "sub"))
    assert files_in(str(tmp_path / "gone"), recursive=True, globs=()) == [str(tmp_path / "gone")]


def test_links_that_lead_in_circles_end(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "self").symlink_to(folder / "sub" / "self")
    (folder / "again").symlink_to(folder / "sub")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    found = below(folder, files_in(str(folder), recursive=True, globs=()))
    assert [os.path.basename(name) for name in found] == ["a.MKV", "c.wav", "d.jpg", "b.mp4", "gone.mp4"]


def test_the_order_is_that_of_names_not_of_the_disk(tmp_path: Path) -> None:
    for name in ("b/1.mp4", "a.mp4", "a/2.mp4", "a-b/3.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = below(tmp_path, files_in(str(tmp_path), recursive=True, globs=()))
    assert found == ["a/2.mp4", "a-b/3.mp4", "a.mp4", "b/1.mp4"]


def test_a_list_has_a_name_a_line() -> None:
    data = b"\xef\xbb\xbf# clips\na.mp4\r\n\n  spaces in it .mp4 \n#not.mp4\nb#c.mp4"
    assert listed(data, nul=False) == ["a.mp4", "  spaces in it .mp4 ", "b#c.mp4"]
    assert listed(b"#a.mp4\0line\nend.mp4\0\0", nul=True) == ["#a.mp4", "line\nend.mp4"]
    assert os.fsencode(listed(b"caf\xe9.mp4\n", nul=False)[0]) == b"caf\xe9.mp4"


def test_questions_are_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("# about speech\nwhat is said?\n\n who speaks? \nwhat is said?\n", encoding="utf-8")
    assert questions_in(path) == ["what is said?", "who speaks?"]
    path.write_text("# none\n")
    with pytest.raises(UsageError, match="holds no questions"):
        questions_in(path)
    with pytest.raises(UsageError, match="cannot read"):
        questions_in(tmp_path / "none.txt")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        questions_in(path)


@given(st.lists(st.sampled_from("abcde"), max_size=20), st.integers(1, 6))
def test_shards_are_a_partition_by_file(paths: list[str], count: int) -> None:
    items = [Item(path, str(number)) for number, path in enumerate(paths)]
    shards = [shard_of(items, index, count) for index in range(1, count + 1)]
    assert sorted((item for shard in shards for item in shard), key=lambda item: int(item.question)) == items
    for shard in shards:
        assert shard == [item for item in items if item in shard]  # in order
    homes = {path: {i for i, shard in enumerate(shards) if path in {s.path for s in shard}} for path in paths}
    assert all(len(home) == 1 for home in homes.values())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.mp4", "no such file"),
        (".", "is a folder"),
        ("empty.mp4", "empty"),
        ("http://a/b", "an address"),
    ],
)
def test_what_needs_no_decoder_to_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.mp4").touch()
    Path("a:b.mp4").write_bytes(b"x")
    check_file("a:b.mp4")
    with pytest.raises(MediaMissing, match=problem):
        check_file(name)
    with pytest.raises(MediaMissing):
        check_file("nul\0in it")
