"""A session that decodes together, and clips for it; files that need others have their own of these names."""

from pathlib import Path

import pytest

from seats_cli.batch.reading import Clip
from seats_cli.batch.sources import Item
from seats_cli.engine.graph import GraphDecoder
from seats_cli.session import ModelOptions, Session


@pytest.fixture
def session(tiny_checkpoint_path: Path) -> Session:
    """On a CPU there is no graph; the same steps run without one."""
    session = Session(ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32"))
    session.graph = GraphDecoder(session.adapter)
    return session


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Five clips of several lengths, one of them broken, one asked twice."""
    from make_clips import pictures, tone, write_clip

    folder = tmp_path_factory.mktemp("clips")
    made = []
    for name, n_frames in (("a", 30), ("b", 0), ("c", 20), ("d", 50), ("e", 10)):
        path = folder / f"{name}.mp4"
        if n_frames:
            write_clip(path, pictures(n_frames), fps=10, audio=tone(n_frames / 10))
        else:
            path.write_bytes(b"broken")
        questions = ("what is said?", "why") if name == "c" else ("what is said?",)
        made.append(tuple(Item(str(path), text, key=f"{name}{i}") for i, text in enumerate(questions)))
    return made
