"""docs/method.md names functions and shows a method: both must be true."""

import importlib
import re
from pathlib import Path

import torch

from seats_cli.selection import methods
from seats_cli.selection.contract import Method, by_windows
from seats_cli.selection.planning import flat_plan
from test_methods import media, plan_for

PAGE = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")


def test_every_function_named_with_its_module_exists() -> None:
    named = re.findall(r"`((?:selection|model|presets)(?:\.\w+)*)\.(\w+)`", PAGE)
    assert len(named) > 8
    for module, name in named:
        assert hasattr(importlib.import_module(f"seats_cli.{module}"), name), f"{module}.{name}"


def test_every_method_is_described() -> None:
    for name in methods.METHODS:
        assert f"| `{name}` |" in PAGE


def test_headings_that_the_code_refers_to_exist() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    package = Path(methods.__file__).parents[1]
    referred = [
        (path.name, heading)
        for path in package.rglob("*.py")
        for heading in re.findall(r'docs/method\.md,\s+"([^"]+)"', path.read_text(encoding="utf-8"))
    ]
    assert len(referred) > 8
    for name, heading in referred:
        assert any(" ".join(heading.split()) in title for title in headings), f"{name}: {heading}"


def test_the_example_is_a_method() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    space: dict[str, object] = {
        "Method": Method,
        "by_windows": by_windows,
        "flat_plan": flat_plan,
        "torch": torch,
    }
    exec(code, space)  # the page's own text
    method = space["EveryOther"]()  # type: ignore[operator]
    plan = plan_for(method)
    kept = method.before_llm(media("video"), plan)
    assert len(kept.indices) == plan.stages[0].n_video
    assert (kept.indices.diff() > 0).all()
