"""The command as a process: entry points, pipes, and the committed reference of commands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seats_cli import __version__

ROOT = Path(__file__).parents[2]
SEATS = [sys.executable, "-m", "seats_cli"]


def test_python_m_and_version() -> None:
    done = subprocess.run([*SEATS, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"seats {__version__}\n", "")


def test_no_arguments_show_help() -> None:
    done = subprocess.run(SEATS, capture_output=True, text=True)
    assert "ask" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_plain_in_a_pipe() -> None:
    done = subprocess.run([*SEATS, "ask", "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("Usage: seats ask [OPTIONS] MEDIA... QUESTION")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout


def test_a_missing_file_is_one_line_and_exit_1() -> None:
    done = subprocess.run([*SEATS, "ask", "no-such.mp4", "why?"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: no such file: no-such.mp4\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    """`seats ask ... --json | head -c 1`: nothing on stderr but what belongs there."""
    program = (
        "import sys\n"
        "from seats_cli.cli.app import run\n"
        "from seats_cli.cli import ask\n"
        "def endless(terminal, request):\n"
        "    while True: terminal.answer('word ' * 1000)\n"
        "ask.answer_all = endless\n"
        "sys.exit(run(['ask', 'clip.mp4', 'why?']))\n"
    )
    command = f'"{sys.executable}" -c "$PROGRAM" | head -c 1'
    environment = {"PROGRAM": program, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("w", "")


def listening_to_ctrl_c() -> None:
    """A shell starts background jobs deaf to Ctrl-C, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_is_130_without_a_traceback() -> None:
    program = (
        "import sys, time\n"
        "from seats_cli.cli.app import run\n"
        "from seats_cli.cli import ask\n"
        "def endless(terminal, request):\n"
        "    terminal.answer_piece('half an ans')\n"
        "    time.sleep(60)\n"
        "ask.answer_all = endless\n"
        "sys.exit(run(['ask', 'clip.mp4', 'why?']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=listening_to_ctrl_c,
    )
    assert process.stdout is not None
    first = process.stdout.read(11)  # it is in the middle of its answer now
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, first + rest, errors) == (130, b"half an ans\n", b"interrupted\n")


def test_ctrl_c_while_libraries_load_ends_at_once(tmp_path: Path) -> None:
    """A stand-in for torch that takes long to import and cannot bear an exception, as native code cannot."""
    slow = """
print("importing", flush=True)
import os, time
try:
    time.sleep(60)
except BaseException:
    os.abort()
"""
    (tmp_path / "torch.py").write_text(slow)
    (tmp_path / "clip.mp4").write_bytes(b"not empty")
    process = subprocess.Popen(
        [*SEATS, "ask", str(tmp_path / "clip.mp4"), "why?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=listening_to_ctrl_c,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"interrupted\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_on(shell: str) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    command = [*SEATS, "--show-completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "_SEATS_COMPLETE" in done.stdout


def test_the_reference_is_what_the_commands_say() -> None:
    from seats_cli.cli.reference import reference

    committed = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert committed == reference(), "docs/cli.md is stale: run `make docs`"


def test_the_reference_names_every_option() -> None:
    from seats_cli.cli.reference import reference

    page = reference()
    for name in (
        "--ratio",
        "--compare",
        "--no-stats",
        "SEATS_RATIO",
        "seats demo",
        "seats doctor",
        "--overwrite",
    ):
        assert name in page
