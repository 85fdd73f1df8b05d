"""`seats demo`: what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from cli.conftest import Run


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Calls of the renderer, which writes two small files instead of a clip."""
    calls: list[tuple[object, ...]] = []

    def write_clip(
        path: Path, seed: int, seconds: float, *, size: int, on_progress: object
    ) -> dict[str, object]:
        calls.append((path, seed, seconds, size))
        document = {"questions": [{"family": "text", "question": "what is 'written'?", "answer": "seven"}]}
        Path(path).write_bytes(b"clip")
        Path(path).with_suffix(".json").write_text(json.dumps(document))
        return document

    monkeypatch.setattr("seats_cli.demo.write.write_clip", write_clip)
    return calls


def test_paths_on_stdout_and_a_question_on_stderr(run: Run, written: list[object], tmp_path: Path) -> None:
    out = tmp_path / "my clip.mp4"
    result = run("demo", out, "--seed", "7", "--seconds", "32", "--size", "224")
    assert result.exit_code == 0, result.stderr
    assert written == [(out, 7, 32.0, 224)]
    assert result.stdout.splitlines() == [str(out), str(out.with_suffix(".json"))]
    suggested = result.stderr.removeprefix("try: ").strip()
    import shlex

    assert shlex.split(suggested) == ["seats", "ask", str(out), "what is 'written'?"]


def test_nothing_is_overwritten_unless_asked(run: Run, written: list[object], tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    out.with_suffix(".json").write_text("mine")
    refused = run("demo", out)
    assert refused.exit_code == 2
    assert "a.json exists" in refused.stderr
    assert written == []
    assert run("demo", out, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("a.avi", [], "does not end in .mp4"),
        ("none/a.mp4", [], "there is no folder"),
        ("a.mp4", ["--seconds", "3"], "3 is out of range"),
        ("a.mp4", ["--seed", "-1"], "-1 is out of range"),
        ("a.mp4", ["--size", "1024"], "1024 is out of range"),
    ],
)
def test_refusals(
    run: Run, written: list[object], tmp_path: Path, name: str, options: list[str], expected: str
) -> None:
    result = run("demo", tmp_path / name, *options)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert written == []
