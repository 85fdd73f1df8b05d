"""Where options come from: command line, then environment, then config file, then defaults."""

from pathlib import Path

import pytest

from cli.conftest import Run, Script


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where the config file is looked for on this platform, in an empty home."""
    from seats_cli.cli.config import default_path

    path = default_path()
    assert tmp_path in path.parents
    path.parent.mkdir(parents=True)
    return path


def test_command_line_over_environment_over_file(run: Run, script: Script, clip: Path, config: Path) -> None:
    config.write_text("ratio: 0.3\nmax-new-tokens: 9\nmethod: random\nquiet: true\n")
    result = run("ask", clip, "why?")
    assert (script.last.ratio, script.last.max_new_tokens, script.last.method) == (0.3, 9, "random")
    assert result.stderr == ""
    run("ask", clip, "why?", env={"SEATS_RATIO": "0.4"})
    assert (script.last.ratio, script.last.max_new_tokens) == (0.4, 9)
    run("ask", clip, "why?", "-r", "0.5", env={"SEATS_RATIO": "0.4"})
    assert script.last.ratio == 0.5
    config.write_text("hwaccel: auto\n")
    run("ask", clip, "why?")
    run("ask", clip, "why?", env={"SEATS_HWACCEL": "cuda"})
    assert [options.hwaccel for options in script.opened[-2:]] == ["auto", "cuda"]


def test_settings_merge_key_by_key(run: Run, script: Script, clip: Path, config: Path) -> None:
    config.write_text("set:\n  tau: 0.2\n  merge: on\n")
    run("ask", clip, "why?", "--set", "tau=0.3")
    assert script.last.settings == {"tau": "0.3", "merge": "on"}


def test_a_file_may_be_named(run: Run, script: Script, clip: Path, config: Path, tmp_path: Path) -> None:
    config.write_text("ratio: 0.3\n")
    other = tmp_path / "other.yaml"
    other.write_text("model: omni-3b\n")
    run("ask", clip, "why?", "--config", other)
    assert (script.opened[-1].model, script.last.ratio) == ("omni-3b", 0.10)
    run("ask", clip, "why?", env={"SEATS_CONFIG": str(other)})
    assert script.opened[-1].model == "omni-3b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ratios: 0.3\n", "unknown in the config file"),
        ("ratio: 7\n", "7 is out of range"),
        ("ratio: [1]\n", "must be one value"),
        ("method: best\n", "seats, full, random, fixed"),
        ("set: merge\n", "must be a mapping"),
        ("set: {mrge: on}\n", "unknown setting 'mrge'"),
        ("- ratio\n", "must hold `option: value` lines"),
        ("a: b: c\n", "is not YAML"),
        ("start: 3\n", "unknown in the config file"),
    ],
)
def test_a_wrong_file_is_a_usage_error(
    run: Run, script: Script, clip: Path, config: Path, text: str, expected: str
) -> None:
    config.write_text(text)
    result = run("ask", clip, "why?")
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.split())
    assert script.opened == []


def test_unknown_keys_list_the_accepted_ones(run: Run, script: Script, clip: Path, config: Path) -> None:
    config.write_text("ratios: 0.3\nmodl: tiny\n")
    told = run("ask", clip, "why?").stderr
    assert f"{config}: modl, ratios" in told
    accepted = told.split("accepted: ")[1].strip().split(", ")
    assert {"model", "ratio", "set", "temperature", "offline"} <= set(accepted)
    assert not {"config", "help", "media", "question", "start"} & set(accepted)


def test_a_named_file_must_be_there(run: Run, script: Script, clip: Path, tmp_path: Path) -> None:
    result = run("ask", clip, "why?", "--config", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "cannot read the config file" in result.stderr


def test_help_and_doctor_survive_a_broken_file(run: Run, config: Path) -> None:
    config.write_text("a: b: c\n")
    assert run("ask", "--help").exit_code == 0
    assert str(config) in run("doctor").stdout


def test_a_wrong_variable_is_named(run: Run, script: Script, clip: Path) -> None:
    result = run("ask", clip, "why?", env={"SEATS_TOP_P": "2"})
    assert result.exit_code == 2
    assert "SEATS_TOP_P" in result.stderr
