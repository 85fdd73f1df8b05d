"""Keys: what makes another answer of a question, and what does not."""

import os
from pathlib import Path
from typing import Any

import pytest

from seats_cli.batch.resume import by_clip, left_of, with_keys
from seats_cli.batch.sources import Item

MODEL = {"model": "tiny", "dtype": "auto", "load_format": "auto", "device": "auto"}
ASKED = {"ratio": 0.1, "method": "seats", "preset": None, "settings": {}}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    return path


def key(item: Item, model: dict[str, Any] = MODEL, asked: dict[str, Any] = ASKED) -> str:
    return with_keys([item], model, asked)[0].key


def test_a_key_stands_for_all_that_decides_an_answer(clip: Path, tmp_path: Path) -> None:
    item = Item(str(clip), "why?")
    other = tmp_path / "other.mp4"
    other.write_bytes(b"abc")
    os.utime(other, (1, 1))
    preset = tmp_path / "mine.yaml"
    preset.write_text("a: 1")
    keys = [
        key(item),
        key(Item(str(other), "why?")),
        key(Item(str(clip), "how?")),
        key(Item(str(clip), "why?", start_s=1.0)),
        key(Item(str(clip), "why?", end_s=1.0)),
        key(Item(str(clip), "why?", id="row 7")),
        key(item, {**MODEL, "quantize": "4bit"}),
        key(item, {**MODEL, "model": "omni-7b"}),
        key(item, {**MODEL, "dtype": "float32"}),
        key(item, {**MODEL, "load_format": "dummy"}),
        key(item, MODEL, {**ASKED, "ratio": 0.2}),
        key(item, MODEL, {**ASKED, "settings": {"tau": "0.2"}}),
        key(item, MODEL, {**ASKED, "preset": str(preset)}),
    ]
    preset.write_text("a: 2")
    keys.append(key(item, MODEL, {**ASKED, "preset": str(preset)}))
    os.utime(clip, (2, 2))
    keys.append(key(item))
    clip.write_bytes(b"abcd")
    os.utime(clip, (1, 1))
    keys.append(key(item))
    clip.unlink()
    keys.append(key(item))
    assert len(set(keys)) == len(keys) == 17


def test_a_key_does_not_stand_for_where_it_was_run(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = key(Item(str(clip), "why?"))
    monkeypatch.chdir(clip.parent)
    assert key(Item("clip.mp4", "why?"), {**MODEL, "device": "cuda:1"}) == first
    assert key(Item("clip.mp4", "why?"), {**MODEL, "model": "tiny"}) == first
    names = [{**MODEL, "model": name} for name in ("omni-7b", "Qwen/Qwen2.5-Omni-7B")]
    assert key(Item("clip.mp4", "why?"), names[0]) == key(Item("clip.mp4", "why?"), names[1])


def test_what_is_left_is_what_has_no_record_once() -> None:
    items = [Item("a.mp4", "why?", key=name) for name in "abcad"]
    left = left_of(items, {"b": True, "d": False, "z": True})
    assert [item.key for item in left.items] == ["a", "c"]
    assert (left.done, left.failed, left.repeated) == (2, 1, 1)


def test_neighbours_about_one_part_are_read_once() -> None:
    a, a_part, b = Item("a", "1"), Item("a", "2", start_s=1.0), Item("b", "1")
    assert list(by_clip([a, a, a_part, b, b, a])) == [(a, a), (a_part,), (b, b), (a,)]
    assert list(by_clip([])) == []
