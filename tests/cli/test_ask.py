"""`seats ask`: streams, exit codes, JSON, several files, errors."""

import errno
import io
import json
import sys
from pathlib import Path

import pytest

from cli.conftest import Run, Script
from seats_cli.cli.app import run as command_line
from seats_cli.cli.loading import EMBEDDED_NOTICE
from seats_cli.errors import DeviceError, MediaError, ModelError, PlanError, UsageError


def test_the_answer_and_nothing_else_goes_to_stdout(run: Run, script: Script, clip: Path) -> None:
    result = run("ask", clip, "what is said?")
    assert result.exit_code == 0
    assert result.stdout == "a red star\n"
    assert EMBEDDED_NOTICE in result.stderr
    assert script.asked[0][:2] == (str(clip), "what is said?")


def test_defaults_are_those_of_the_python_api(run: Run, script: Script, clip: Path) -> None:
    from seats_cli.session import AskOptions, ModelOptions

    run("ask", clip, "why?")
    assert script.last == AskOptions()
    assert script.opened == [ModelOptions()]


def test_every_option_reaches_the_session(run: Run, script: Script, clip: Path) -> None:
    from seats_cli.session import AskOptions, ModelOptions

    result = run(
        *("ask", clip, "why?", "-m", "omni-7b", "--device", "cuda:1", "--dtype", "bfloat16", "--offline"),
        *("--hwaccel", "cuda"),
        *(
            "--load-format",
            "dummy",
            "-r",
            "0.2",
            "--method",
            "random",
            "--preset",
            "paper",
            "--set",
            "tau=0.2",
        ),
        *(
            "--set",
            "merge=on",
            "--max-new-tokens",
            "7",
            "--temperature",
            "0.5",
            "--top-p",
            "0.9",
            "--seed",
            "3",
        ),
        *(
            "--system",
            "Be brief.",
            "--fps",
            "1",
            "--max-frames",
            "64",
            "--start",
            "1:02",
            "--end",
            "0:01:10.5",
        ),
    )
    assert result.exit_code == 0, result.stderr
    assert "random weights" in result.stderr
    assert script.opened == [
        ModelOptions(
            model="omni-7b", device="cuda:1", dtype="bfloat16", load_format="dummy", offline=True,
            hwaccel="cuda",
        )
    ]  # fmt: skip
    assert script.last == AskOptions(
        ratio=0.2, method="random", preset="paper", settings={"tau": "0.2", "merge": "on"}, max_new_tokens=7,
        temperature=0.5, top_p=0.9, seed=3, system="Be brief.", fps=1.0, max_frames=64, start_s=62.0,
        end_s=70.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ratio", "0"], "0 is out of range; accepted: a number above 0 and at most 1"),
        (["--ratio", "1.01"], "1.01 is out of range"),
        (["--ratio", "nan"], "nan is out of range"),
        (["--ratio", "half"], "'half' is not a number"),
        (["--top-p", "0"], "above 0 and at most 1"),
        (["--temperature", "-1"], "-1 is out of range; accepted: a number at least 0"),
        (["--temperature", "inf"], "inf is out of range"),
        (["--max-new-tokens", "0"], "a whole number at least 1"),
        (["--max-new-tokens", "2.5"], "'2.5' is not a number; accepted: a whole number"),
        (["--method", "best"], "seats, full, random, fixed"),
        (["--device", "gpu"], "'gpu' is not one of auto, cpu"),
        (["--hwaccel", "vaapi"], "'vaapi' is not one of none, auto, cuda"),
        (["--dtype", "int8"], "'int8' is not one of auto, float32, bfloat16, float16"),
        (["--load-format", "gguf"], "'gguf' is not one of auto, dummy"),
        (["--start", "1:75"], "'1:75' is not a time"),
        (["--start", "10", "--end", "0:10"], "10 s does not come after --start 10 s"),
        (["--end", "0"], "0 s does not come after the clip's beginning"),
        (["--set", "tau"], "'tau' is not KEY=VALUE"),
        (["--set", "tua=1"], "unknown setting 'tua'"),
        (["--preset", "nope"], "no preset 'nope'"),
        (["--compare", "--method", "full"], "--method full"),
        (["--rato", "1"], "No such option: --rato"),
    ],
)
def test_wrong_usage(run: Run, script: Script, clip: Path, arguments: list[str], expected: str) -> None:
    result = run("ask", clip, "why?", *arguments)
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert script.opened == []


def test_the_question_comes_last(run: Run, script: Script, clip: Path) -> None:
    assert "files and a question are missing" in run("ask").stderr
    assert "the question is missing" in run("ask", clip).stderr
    assert "files or a question are missing" in run("ask", "why?").stderr
    assert "is a file" in run("ask", clip, clip).stderr
    assert "blank" in run("ask", clip, "  ").stderr
    for arguments in ([], [clip], ["why?"], [clip, clip], [clip, " "], [clip, ""], [clip, "x" * 5000, ""]):
        assert run("ask", *arguments).exit_code == 2
    assert run("ask", clip, "x" * 5000).exit_code == 0  # longer than any file name may be


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.mp4", "no such file"),
        (".", "is a folder"),
        ("empty", "is empty"),
        ("https://example.org/a.mp4", "is an address"),
    ],
)
def test_a_file_that_cannot_be_opened(
    run: Run, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    result = run("ask", name, "why?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: {name}" in result.stderr or f": {name}" in result.stderr
    assert expected in result.stderr
    assert script.opened == []


def test_several_files_have_headers_and_one_failure_stops_none(run: Run, script: Script, clip: Path) -> None:
    other, broken = clip.with_name("b.mp4"), clip.with_name("broken.mp4")
    other.write_bytes(b"x")
    broken.write_bytes(b"x")
    script.replies = {"b.mp4": "two", "broken.mp4": MediaError("no frame decodes", hint="try another")}
    result = run("ask", clip, broken, "gone.mp4", other, "why?")
    assert result.exit_code == 1
    assert [Path(media).name for media, _, _ in script.asked] == ["clip.mp4", "broken.mp4", "b.mp4"]
    assert result.stdout == f"==> {clip} <==\na red star\n==> {other} <==\ntwo\n"
    assert f"error: {broken}: no frame decodes\nhint: try another\n" in result.stderr
    assert "error: no such file: gone.mp4" in result.stderr
    assert len(script.opened) == 1


@pytest.mark.parametrize("several", [False, True])
def test_what_no_file_could_be_asked_with_is_told_once(
    run: Run, script: Script, clip: Path, several: bool
) -> None:
    other = clip.with_name("b.mp4")
    other.write_bytes(b"x")
    script.setup_error = PlanError("the preset is made for 28 layers")
    result = run("ask", clip, *([other] if several else []), "why?")
    assert (result.exit_code, result.stdout, script.asked) == (2, "", [])
    assert result.stderr.count("error: the preset is made for 28 layers") == 1


def test_json_is_one_document(run: Run, script: Script, clip: Path) -> None:
    result = run("ask", clip, "was heißt das?", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert document["answer"] == "a red star"
    assert document["question"] == "was heißt das?"
    assert set(document) == {
        "schema_version", "media", "question", "answer", "method", "tokens", "retention", "compute", "timing",
        "memory", "environment", "options",
    }  # fmt: skip


def test_json_of_several_files_and_of_failures(run: Run, script: Script, clip: Path) -> None:
    result = run("ask", clip, "gone.mp4", "why?", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [("answer" in r, "error" in r) for r in document["results"]] == [(True, False), (False, True)]
    assert document["results"][1]["error"]["kind"] == "media_missing"
    alone = json.loads(run("ask", "gone.mp4", "why?", "--json").stdout)
    assert alone["error"]["message"] == "no such file: gone.mp4"
    assert alone["schema_version"] == document["schema_version"] == 1


def test_the_schema_version_is_the_reports() -> None:
    from seats_cli.cli.options import SCHEMA_VERSION
    from seats_cli.measure import report

    assert SCHEMA_VERSION == report.SCHEMA_VERSION


def test_method_names_are_those_of_the_table() -> None:
    from seats_cli.cli.options import METHOD_NAMES
    from seats_cli.selection.methods import METHODS

    assert set(METHOD_NAMES) == set(METHODS)


def test_the_ways_to_decode_are_those_of_the_media_room() -> None:
    from seats_cli.cli.options import HWACCELS
    from seats_cli.media.nvdec import CHOICES

    assert HWACCELS == CHOICES


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("no such checkpoint"), 2),
        (DeviceError("no CUDA device"), 1),
        (UsageError("no such alias"), 2),
        (RuntimeError("boom"), 1),
    ],
)
def test_a_model_that_does_not_load(
    run: Run, script: Script, clip: Path, error: Exception, code: int
) -> None:
    script.load_error = error
    result = run("ask", clip, "why?")
    assert (result.exit_code, result.stdout) == (code, "")
    assert str(error) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_is_told_without_a_traceback_unless_debugging(run: Run, script: Script, clip: Path) -> None:
    script.replies = {"clip.mp4": ValueError("boom")}
    result = run("ask", clip, "why?")
    assert result.exit_code == 1
    assert f"error: {clip}: unexpected ValueError: boom" in result.stderr
    assert "Traceback" not in result.stderr
    debugged = run("ask", clip, "why?", "--debug")
    assert "Traceback" in debugged.stderr
    assert "raise reply" in debugged.stderr  # the line that raised, not the one that told


def test_ctrl_c_ends_with_130_and_keeps_what_is_done(run: Run, script: Script, clip: Path) -> None:
    other = clip.with_name("b.mp4")
    other.write_bytes(b"x")
    script.replies = {"b.mp4": KeyboardInterrupt()}
    result = run("ask", clip, other, "why?", "--json")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    assert [r["answer"] for r in json.loads(result.stdout)["results"]] == ["a red star"]


def test_quiet_verbose_and_stats(run: Run, script: Script, clip: Path) -> None:
    script.warnings = ["only the first 3 s decode"]
    plain = run("ask", clip, "why?")
    assert "device cpu" not in plain.stderr
    assert "after stage I" not in plain.stderr  # nobody is watching
    assert plain.stderr.count("warning: only the first 3 s decode") == 1
    quiet = run("ask", clip, "why?", "--quiet")
    assert quiet.stderr == "warning: only the first 3 s decode\n"
    assert "device cpu: there is no other" in run("ask", clip, "why?", "-v").stderr
    stats = run("ask", clip, "why?", "--stats", "--quiet")
    assert "after stage I" in stats.stderr
    assert "9.8%" in stats.stderr
    assert stats.stdout == "a red star\n"


def test_token_counts_are_told_once_before_the_answer(run: Run, script: Script, clip: Path) -> None:
    assert run("ask", clip, "why?").stderr.count("1024 video and 400 audio tokens") == 1
    assert run("ask", clip, "why?", "--compare").stderr.count("1024 video") == 1
    assert "1024 video" not in run("ask", clip, "why?", "-q").stderr


def test_an_answer_that_is_cut_off_or_empty_is_told(run: Run, script: Script, clip: Path) -> None:
    script.replies = {clip.name: "and then..."}
    told = run("ask", clip, "why?", "--max-new-tokens", "5", "-q").stderr
    assert told == "warning: the answer was cut off at --max-new-tokens 5\n"
    script.replies = {clip.name: ""}
    assert "without a word" in run("ask", clip, "why?").stderr
    script.replies = {clip.name: "done"}
    assert "--max-new-tokens" not in run("ask", clip, "why?").stderr


def test_a_full_disk_is_no_bug(run: Run, script: Script, clip: Path) -> None:
    script.replies = {clip.name: OSError(errno.ENOSPC, "No space left on device")}
    told = run("ask", clip, "why?").stderr
    assert "cannot write: No space left on device" in told
    assert "this is a bug" not in told


def test_warnings_name_the_file_where_there_are_several(run: Run, script: Script, clip: Path) -> None:
    other = clip.with_name("other.mp4")
    other.write_bytes(clip.read_bytes())
    script.warnings = ["only the first 3 s decode"]
    told = run("ask", clip, other, "why?").stderr
    assert f"warning: {clip}: only the first 3 s decode" in told
    assert f"warning: {other}: only the first 3 s decode" in told


def test_the_notice_is_for_the_embedded_model(run: Run, script: Script, clip: Path) -> None:
    assert "toy world" in run("ask", clip, "why?").stderr
    assert "toy world" not in run("ask", clip, "why?", "-q").stderr
    assert "toy world" not in run("ask", clip, "why?", "-m", "Qwen/Qwen2.5-Omni-7B").stderr


def test_compare_runs_full_tokens_too(run: Run, script: Script, clip: Path) -> None:
    result = run("ask", clip, "why?", "--compare")
    assert result.stdout == "a red star\n"
    assert [(o.method, o.ratio, o.max_new_tokens) for _, _, o in script.asked] == [
        ("seats", 0.10, 2),  # what is timed afterwards is warm
        ("seats", 0.10, 256),
        ("full", 1.0, 256),
    ]
    row = next(line for line in result.stderr.splitlines() if line.strip().startswith("prefill  "))
    assert row.split() == ["prefill", "1.00", "s", "250.0", "ms", "4.00x"]
    document = json.loads(run("ask", clip, "why?", "--compare", "--json").stdout)
    assert document["method"]["name"] == "seats"
    assert document["full"]["method"]["name"] == "full"


def test_stdin_is_left_alone(script: Script, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `while read f; do seats ask "$f" ...; done` loop keeps its list."""

    class Unread(io.StringIO):
        def read(self, *_: object) -> str:
            raise AssertionError("stdin was read")

        readline = read

    monkeypatch.setattr(sys, "stdin", Unread())
    assert command_line(["ask", str(clip), "why?"]) == 0
