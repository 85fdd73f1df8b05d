"""docs/cli.md from the commands themselves: `make docs`, or `python -m seats_cli.cli.reference`."""

from collections.abc import Iterator
from typing import Any

import typer.main

from seats_cli.cli.app import build_app
from seats_cli.cli.console import Terminal

HEAD = """\
# Commands

Generated from `seats --help` by `make docs`; do not edit.

Options are taken from the command line, else from the environment, else from the config file, else from the
defaults here. [The guide](guide.md) shows them in use.
"""


def reference() -> str:
    """The whole page as Markdown."""
    root: Any = typer.main.get_command(build_app(decorated=False))
    context = root.make_context("seats", [], resilient_parsing=True)
    lines = [HEAD, *section(root, context, "seats")]
    for name, command in root.commands.items():
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        lines += section(command, inner, f"seats {name}")
    return "\n".join(lines).rstrip() + "\n"


def section(command: Any, context: Any, name: str) -> Iterator[str]:
    """One command: usage, what it does, its arguments, its options by group."""
    yield f"## {name}\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"    {name} {usage}\n"
    yield paragraphs(command.help or "") + "\n"
    shown = [p for p in command.params if not getattr(p, "hidden", False) and getattr(p, "help", None)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    for argument in arguments:
        yield f"- `{argument.metavar}`: {argument.help}"
    if arguments:
        yield ""
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(option.rich_help_panel or "Options", []).append(option)
    for panel, members in panels.items():
        yield f"### {panel}\n"
        yield from (row(option) for option in members)
        yield ""


def row(option: Any) -> str:
    """One option as a list item: names, value, help, variable, default."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = f" `{option.metavar}`" if option.metavar and not option.is_flag else ""
    extras = []
    if option.envvar:
        extras.append(f"`{option.envvar}`")
    if isinstance(option.show_default, str):
        extras.append(f"default: {option.show_default}")
    elif option.default is not None and not option.is_flag:
        extras.append(f"default: `{option.default}`")
    note = f" ({'; '.join(extras)})" if extras else ""
    return f"- {names}{value}: {option.help}{note}"


def paragraphs(text: str) -> str:
    """A docstring with each paragraph on one line."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


if __name__ == "__main__":
    Terminal().out.write(reference())
