"""The rooms keep to themselves: who may import whom (docs/architecture.md), read with ast."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from processor_time import is_instant

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "seats_cli"

# room -> rooms that it may import; every room may import itself, and OPEN.
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"session", "measure", "demo", "lab", "batch"},
    "batch": {"session", "answering", "asking", "engine", "model", "measure", "media"},
    "lab": {
        "batch",
        "session",
        "answering",
        "asking",
        "engine",
        "model",
        "measure",
        "selection",
        "demo",
        "media",
    },
    "session": {"answering", "asking", "media", "model", "engine", "selection", "measure"},
    "answering": {"asking", "media", "model", "engine", "selection", "measure"},
    "asking": {"media", "model", "engine", "selection", "measure"},
    "engine": {"model", "selection", "measure"},
    "model": {"selection"},
    "measure": {"selection"},
    "demo": {"media", "model", "engine", "session", "selection"},  # selection: layouts, which prompts carry
    "selection": set(),
    "media": set(),
    "presets": set(),
    "errors": set(),
    "seats_cli": {"session"},  # __init__.py, on first use of its lazy names
    "__main__": {"cli"},
}
# Modules that are open to all (the package itself has only __version__); none of them imports torch.
OPEN = (
    "seats_cli",
    "seats_cli.errors",
    "seats_cli.presets",
    "seats_cli.selection.options",
    "seats_cli.media.nvdec",
)

# Third-party packages, room by room, for the rooms that are held to few. Standard library aside.
THIRD_PARTY: dict[str, set[str]] = {
    "cli": {
        "typer",
        "rich",
        "yaml",
        "packaging",
        "torch",
        "av",
    },  # the last two inside functions of doctor.py
    "batch": {"torch", "ray"},  # ray in ray_engine.py alone
    "session": {"torch", "numpy"},
    "answering": set(),
    "asking": set(),
    "engine": {"torch", "numpy"},
    "measure": {"torch"},
    "selection": {"torch", "triton"},  # triton in kernels.py alone, on CUDA
    "media": {"numpy", "av", "librosa", "soundfile", "soxr"},
    "presets": {"yaml"},
    "errors": set(),
    "seats_cli": set(),
    "__main__": set(),
}
ONLY_MODEL_MAY = "transformers"  # besides demo, which builds the network that it trains
HEAVY = {"torch", "transformers", "av", "librosa", "soundfile", "numpy", "scipy"}


def imports_of(source: str, module: str) -> Iterator[tuple[str, bool]]:
    """Dotted names that a module imports, and whether it does so on import (not inside a function)."""
    package = module.split(".")[:-1]

    def visit(node: ast.AST, on_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, on_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                origin = ".".join([*base, *([child.module] if child.module else [])])
                # `from seats_cli.cli import ask` may name a module: count the longer name
                yield from ((f"{origin}.{alias.name}", on_import) for alias in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                yield from visit(child, on_import and not inside and not typing_only)

    yield from visit(ast.parse(source), True)


def room_of(module: str) -> str:
    """`seats_cli.cli.ask` and `seats_cli.cli.__init__` -> cli; `seats_cli.__init__` -> seats_cli."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def violations(module: str, source: str) -> list[str]:
    """What a module imports that its room must not."""
    room = room_of(module)
    assert room in MAY_IMPORT, f"{module}: no rule says what the room {room!r} may import"
    found = []
    for name, _ in imports_of(source, module):
        top = name.split(".")[0]
        if top == "seats_cli":
            target = room_of(name)
            open_to_all = any(name == o or (o != "seats_cli" and name.startswith(f"{o}.")) for o in OPEN)
            from_package = (
                name.count(".") == 1 and target not in MAY_IMPORT
            )  # seats_cli.__version__ and the like
            if not (open_to_all or from_package or target == room or target in MAY_IMPORT[room]):
                found.append(f"{module} imports {name}: {room} may not use {target}")
        elif top not in sys.stdlib_module_names:
            if room in THIRD_PARTY and top not in THIRD_PARTY[room]:
                found.append(f"{module} imports {name}")
            if top == ONLY_MODEL_MAY and room not in ("model", "demo"):
                found.append(f"{module} imports {name}: only model may")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of the package and its file."""
    named = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named.append((".".join(parts), path))
    return named


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_a_room_imports_only_what_it_may(module: str, path: Path) -> None:
    assert violations(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("seats_cli.media.clip", "import torch"),
        ("seats_cli.media.clip", "from seats_cli.selection.layout import TokenLayout"),
        ("seats_cli.selection.plan", "def f():\n    from seats_cli import model"),
        ("seats_cli.engine.decode", "import transformers.cache_utils"),
        ("seats_cli.session", "from .cli.console import Terminal"),
        ("seats_cli.engine.decode", "from ..demo import world"),
        ("seats_cli.cli.ask", "import seats_cli.media.clip as clip"),
    ],
)
def test_the_rule_sees_a_violation(module: str, source: str) -> None:
    assert violations(module, source) != []


@pytest.mark.parametrize("room", ["cli", "presets"])
def test_what_starts_the_command_line_imports_nothing_heavy(room: str) -> None:
    for module, path in modules():
        if room_of(module) == room:
            names = imports_of(path.read_text(encoding="utf-8"), module)
            at_once = {name.split(".")[0] for name, on_import in names if on_import}
            assert not at_once & HEAVY, module


def test_only_the_console_prints() -> None:
    for module, path in modules():
        if (
            module == "seats_cli.cli.console" or room_of(module) == "demo"
        ):  # demo's build scripts tell of progress
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            )
            assert not called, f"{module} prints"


STARTS = [
    ["--help"],
    ["--version"],
    ["ask", "--help"],
    ["ask"],
    ["ask", "clip.mp4", "why?", "--ratio", "2"],
    ["ask", "clip.mp4", "why?", "--preset", "nope"],
    ["ask", "no-such-file.mp4", "why?"],
    ["demo", "clip.avi"],
]


@pytest.mark.parametrize("arguments", STARTS, ids=" ".join)
def test_starts_without_torch(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from seats_cli.cli.app import run\n"
        f"run({arguments!r})\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light() -> None:
    program = f"import sys, seats_cli; sys.exit(bool({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_usage_errors_are_instant() -> None:
    assert is_instant([sys.executable, "-m", "seats_cli", "ask", "clip.mp4"], returns=2)
