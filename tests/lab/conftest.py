"""A session on a tiny random checkpoint, two clips, and what a sweep over them finds."""

from pathlib import Path

import numpy as np
import pytest

from lab.sweeping import ASKING, SETTINGS, run, samples_of
from make_clips import pictures, tone, write_clip
from seats_cli.lab.records import Record
from seats_cli.lab.sweep import Alone, ClipTask, describe, manifest_tasks
from seats_cli.session import ModelOptions, Session


@pytest.fixture(scope="session")
def session(tiny_checkpoint_path: Path) -> Session:
    return Session(ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of two seconds with sound."""
    place = tmp_path_factory.mktemp("media")
    for name, shade in (("a.mp4", 0), ("b.mp4", 60)):
        frames = np.minimum(pictures(20, 84, 84).astype(int) + shade, 255).astype(np.uint8)
        write_clip(place / name, frames, fps=10, audio=tone(2.0))
    return place


@pytest.fixture(scope="session")
def tasks(folder: Path) -> list[ClipTask]:
    return manifest_tasks([*samples_of(folder / "a.mp4"), *samples_of(folder / "b.mp4")])


@pytest.fixture(scope="session")
def team(session: Session) -> Alone:
    return Alone(session, SETTINGS, ASKING, describe(session, SETTINGS, ASKING))


@pytest.fixture(scope="session")
def plain(team: Alone, tasks: list[ClipTask]) -> dict[str, Record]:
    """What one session finds, by key."""
    return run(team, tasks)
