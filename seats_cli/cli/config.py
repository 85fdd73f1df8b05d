"""The config file: YAML whose keys are option names, in the platform's folder for such files.

Its values take the place of the options' defaults, below the environment and the command line:

    model: Qwen/Qwen2.5-Omni-7B
    ratio: 0.15
    set:
      decode_cache: layerwise
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from seats_cli.cli.options import OUTPUT_PANEL
from seats_cli.errors import UsageError

SETTINGS_KEY = "seats_cli.settings"  # where ctx.meta holds the file's `set:` mapping


def default_path() -> Path:
    """Where the file is looked for: ~/.config/seats ($XDG_CONFIG_HOME), Application Support, or %APPDATA%."""
    return Path(typer.get_app_dir("seats")) / "config.yaml"


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a config file, dashes in keys as underscores. Raises UsageError if it is not one."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the config file {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UsageError(f"the config file {path} is not YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"the config file {path} must hold `option: value` lines at its top level")
    return {key.replace("-", "_"): item for key, item in value.items()}


def apply_config(ctx: typer.Context, param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Eager callback of --config: read the file and make its values the defaults of this command."""
    if ctx.resilient_parsing:
        return value
    path = value if value is not None else default_path()
    if value is None and not path.is_file():
        return None
    config = read_config(path)
    reject_unknown(path, config, accepted_keys(ctx))
    ctx.meta[SETTINGS_KEY] = read_settings(path, config.pop("set", None))
    ctx.default_map = {
        parameter.name: checked(ctx, parameter, path, config[parameter.name])
        for parameter in ctx.command.params
        if parameter.name in config
    }
    return path


def accepted_keys(ctx: typer.Context) -> list[str]:
    """Settings that some command has: one file serves all of them. They are the options with a variable."""
    root: Any = ctx.find_root().command
    commands = getattr(root, "commands", {"": ctx.command}).values()
    names = {p.name for command in commands for p in command.params if p.envvar and p.name != "config"}
    return sorted({*names, "set"})


def reject_unknown(path: Path, config: Mapping[str, Any], accepted: Iterable[str]) -> None:
    """Raise UsageError for a key that no command has, listing those there are."""
    accepted = list(accepted)
    unknown = sorted(set(config) - set(accepted))
    if unknown:
        names = ", ".join(unknown)
        raise UsageError(
            f"unknown in the config file {path}: {names}", hint=f"accepted: {', '.join(accepted)}"
        )


def read_settings(path: Path, value: Any) -> dict[str, str]:
    """The `set:` mapping as text, the way --set gives it. Raises UsageError if it is no mapping."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"`set` in the config file {path} must be a mapping, not {value!r}")
    return {str(key): as_text(item) for key, item in value.items()}


def checked(ctx: typer.Context, parameter: Any, path: Path, value: Any) -> str:
    """`value` as the command line would write it, once the option has accepted it; else a UsageError."""
    if isinstance(value, dict | list) or value is None:
        raise UsageError(f"`{parameter.name}` in the config file {path} must be one value, not {value!r}")
    text = as_text(value)
    try:
        parameter.process_value(ctx, text)
    except typer.BadParameter as error:
        problem = f"`{parameter.name}` in the config file {path}: {error.message}"
        raise UsageError(problem) from None
    return text


def as_text(value: Any) -> str:
    """A YAML scalar as a word of a command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=apply_config,
        envvar="SEATS_CONFIG",
        rich_help_panel=OUTPUT_PANEL,
        show_default="config.yaml in the platform's config folder",
        help="Read defaults of these options from a YAML file.",
    ),
]
