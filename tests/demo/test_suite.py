"""The suite's scoring, and that it goes through files and the session."""

import json
from pathlib import Path

import pytest

from seats_cli.demo.questions import FAMILIES
from seats_cli.demo.suite import as_lines, interval, main, normalised, one_of_each, summarise


def test_answers_match_whatever_their_case_spaces_and_full_stop():
    assert normalised(" Red  Seven.\n") == normalised("red seven")
    assert normalised("red seven") != normalised("red eight")


def test_one_question_of_each_family_the_first():
    questions = [{"family": f, "question": f"{f} {i}"} for f in reversed(FAMILIES) for i in range(2)]
    assert [q["question"] for q in one_of_each(questions)] == [f"{family} 0" for family in FAMILIES]


def test_a_document_has_a_line_a_sample():
    document = {"rows": [{"a": 1}, {"a": 2}], "samples": [], "command": "x"}
    text = as_lines(document)
    assert json.loads(text) == document
    assert '{"a": 1},\n{"a": 2}' in text


def test_interval_is_wilsons():
    low, high = interval(9, 10)
    assert (low, high) == (pytest.approx(0.5958, abs=1e-3), pytest.approx(0.9821, abs=1e-3))
    assert interval(0, 0) == (0.0, 1.0)


def test_mean_is_over_families_not_questions():
    rows = [{"ratio": 1.0, "family": "text", "right": True, "retention": 1.0, "seconds": 1.0}] * 3
    rows += [{"ratio": 1.0, "family": "sound", "right": False, "retention": 0.5, "seconds": 3.0}]
    (row,) = summarise(rows, [1.0])
    assert row["accuracy"] == 0.5
    assert row["n"] == 4
    assert row["retention"] == pytest.approx(0.875)


def test_a_clip_is_rendered_asked_about_and_recorded(
    tiny_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "suite.json"
    arguments = ["--clips", "1", "--seconds", "8", "--ratios", "0.5", "--model", str(tiny_checkpoint_path)]
    assert main([*arguments, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [sample["family"] for sample in document["samples"]] == list(FAMILIES)
    assert document["rows"][0]["retention"] == pytest.approx(0.5, abs=0.05)
    assert "transcription" in capsys.readouterr().out
