"""Ray on two cores: the order and the records of one session, whoever dies; and what is said without Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seats_cli.batch import ray_engine
from seats_cli.batch.ray_engine import Answerer, RayTeam
from seats_cli.batch.reading import Listener
from seats_cli.batch.records import Asking
from seats_cli.batch.sources import Item
from seats_cli.errors import ModelError, UsageError

ROOT = Path(__file__).parents[2]
NAMES = "abcdef"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips, the third of them broken."""
    from seats_cli.demo.write import write_clip

    place = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(NAMES):
        write_clip(place / f"{name}.mp4", number, 8.0, "dev", size=128)
        (place / f"{name}.json").unlink()
    (place / "c.mp4").write_bytes(b"broken")
    return place


def poisoned() -> type[Answerer]:
    """An actor that dies whenever it is at e.mp4, and once at b.mp4; made here, so that it travels whole."""

    class Poisoned(Answerer):
        def __call__(self, block: Any) -> Iterator[dict[str, list[str]]]:
            read = self._session.read

            def reading(path: str, *rest: Any, **options: Any) -> Any:
                once = Path(path).with_name("b-has-killed")
                if path.endswith("e.mp4") or (path.endswith("b.mp4") and not once.exists()):
                    once.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return read(path, *rest, **options)

            self._session.read = reading  # type: ignore[method-assign]
            return super().__call__(block)

    return Poisoned


@pytest.mark.slow
def test_a_dead_actor_costs_its_own_clip_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray.data", reason="pip install 'ray[data]'")
    monkeypatch.setattr(ray_engine, "Answerer", poisoned())
    clips = [(Item(str(folder / f"{name}.mp4"), "what is said?", key=name),) for name in NAMES]
    told: list[str] = []
    listener = Listener(warn=lambda message, _: told.append(message))
    with RayTeam(Asking({"model": "tiny"}, {"max_new_tokens": 8}), actors=2) as team:
        assert team.size == 2
        found = {record["key"]: record for record in team.answers(clips, listener)}
    assert sorted(found) == list(NAMES)
    kinds = {key: record["error"]["kind"] for key, record in found.items() if not record["ok"]}
    assert kinds == {"c": "media_format", "e": "worker"}
    assert len(told) == 2
    # The killer is asked again each time, and so is what waited for an actor that died; the last try has an
    # actor for each clip, so that nothing waits for the killer.
    assert all("e.mp4" in message for message in told)
    assert capfd.readouterr().out == ""  # stdout is for records
    monkeypatch.undo()
    with (
        RayTeam(Asking({"model": str(tmp_path)})) as team,
        pytest.raises(ModelError, match=r"no config\.json"),
    ):
        list(team.answers(clips, listener))


def ask(folder: Path, *options: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "seats_cli", "ask", "videos", "what is said?", "--max-new-tokens", "8"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [*command, *options], cwd=folder.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **more,
    )  # fmt: skip


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "timing": None} for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_command_finds_the_same_and_goes_on_after_a_kill(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="pip install 'ray[data]'")
    if not (folder.parent / "videos").exists():
        (folder.parent / "videos").symlink_to(folder)
    plain, by_ray = tmp_path / "plain.jsonl", tmp_path / "ray.jsonl"
    assert ask(folder, "-o", str(plain)).wait() == 1
    killed = ask(folder, "-o", str(by_ray), "--engine", "ray", "--workers", "2")
    deadline = time.monotonic() + 120
    while killed.poll() is None and time.monotonic() < deadline:
        if by_ray.exists() and by_ray.read_bytes().count(b"\n") >= 1:
            break
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    left = len(timeless(by_ray))
    assert left >= 1
    again = ask(folder, "-o", str(by_ray), "--engine", "ray", "--workers", "2")
    stdout, stderr = again.communicate(timeout=180)
    assert again.returncode == 1, stderr  # the broken file
    assert stdout == ""
    assert timeless(by_ray) == timeless(plain)


def test_without_ray_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="needs Ray Data") as met:
        RayTeam(Asking())
    assert "seats-cli[ray]" in str(met.value.hint)
