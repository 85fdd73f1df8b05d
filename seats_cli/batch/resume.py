"""Which records are there already: a key stands for all that decides an answer.

A key is made of the file (path, size, time of change), the range, the question, the model and every option of
the call, before anything is loaded: a run with nothing left to do needs no model. The code is not in it: a
long run goes on after an upgrade of this package.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seats_cli.batch.sources import Item
from seats_cli.presets import resolve_model

HASHED_BYTES = 64 * 2**20  # weights up to this size are known by their content, larger ones by size and time
KEY_LENGTH, RUN_LENGTH = 24, 8  # hex digits; those of a key that stand for the model and the options


# ---- keys -------------------------------------------------------------------------------------------------


def with_keys(items: Sequence[Item], model: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Item]:
    """The items, each with its key. `model`, `asked`: keywords of ModelOptions and AskOptions, as typed.

    Where and how fast it runs (device, compile, graphs, offline) is not in the key, and neither is what a
    file may cost: failures are asked again when that is asked for. A row's own id is: whoever joins on it
    finds a record of each.
    """
    name = resolve_model(model["model"])
    folder = Path(name).expanduser()
    whole = {
        "model": str(folder.absolute()) if folder.is_dir() else name,
        "weights": weights_fingerprint(model["model"]),
        "loaded": [model.get(option) for option in ("dtype", "load_format", "revision", "quantize")],
        "asked": {**asked, "preset": _preset(asked.get("preset"))},
    }
    run = digest_of(whole)
    states: dict[str, list[int] | None] = {}
    keyed = []
    for item in items:
        path = os.path.abspath(item.path)
        if path not in states:
            states[path] = file_state(Path(path))
        about = [run, path, states[path], item.start_s, item.end_s, item.question, item.id]
        key = run[:RUN_LENGTH] + digest_of(about)[: KEY_LENGTH - RUN_LENGTH]
        keyed.append(replace(item, key=key))
    return keyed


def _preset(name: str | None) -> object:
    """A preset by name, or by what its file says."""
    if name is None or not os.path.isfile(name):
        return name
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def weights_fingerprint(model: str) -> str | None:
    """What tells weights from others in the same folder; None for the hub's, which have a revision."""
    name = resolve_model(model)
    folder = Path(__file__).parents[1] / "demo" / "weights" if name == "tiny" else Path(name).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")])
    small = sum(path.stat().st_size for path in files) <= HASHED_BYTES
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if small else json.dumps(file_state(path)).encode())
    return digest.hexdigest()[:16]


def digest_of(value: object) -> str:
    """A digest of anything that JSON can carry."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_state(path: Path) -> list[int] | None:
    """What tells a file from another at the same place; None where there is none."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    return [state.st_size, state.st_mtime_ns]


# ---- what is left to do -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """What there is to do. `items` in their order; `done`: records there are, and how many of them failed."""

    items: tuple[Item, ...]
    done: int
    failed: int
    repeated: int  # questions that are asked twice: answered once


def left_of(items: Iterable[Item], known: Mapping[str, bool]) -> Left:
    """What has no record yet. `known`: for each key that has one, whether it is an answer."""
    seen: set[str] = set()
    left = []
    done = failed = repeated = 0
    for item in items:
        if item.key in seen:
            repeated += 1
            continue
        seen.add(item.key)
        if item.key in known:
            done += 1
            failed += not known[item.key]
        else:
            left.append(item)
    return Left(tuple(left), done, failed, repeated)


def in_order(keys: Sequence[str | None], wanted: Sequence[str]) -> list[int] | None:
    """How to put records into the order of `wanted`: places in `keys`, None where they are in order already.

    Records of something else (None, or a key that is not wanted) keep their places; the others share theirs.
    """
    rank = {key: place for place, key in enumerate(dict.fromkeys(wanted))}
    ours = [place for place, key in enumerate(keys) if key in rank]
    ordered = sorted(ours, key=lambda place: rank[keys[place] or ""])
    if ours == ordered:
        return None
    moved = dict(zip(ours, ordered, strict=True))
    return [moved.get(place, place) for place in range(len(keys))]


def by_clip(items: Iterable[Item]) -> Iterator[tuple[Item, ...]]:
    """Items in groups that one reading of a file serves: neighbours that ask of the same part."""
    group: list[Item] = []
    for item in items:
        if group and group[0].part != item.part:
            yield tuple(group)
            group = []
        group.append(item)
    if group:
        yield tuple(group)
