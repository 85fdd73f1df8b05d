"""Reading a preset file with errors that name the file and the key."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from seats_cli.errors import UsageError


class Section:
    """One mapping of a preset file; every look-up checks the type and can say where it went wrong."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise UsageError(f"{where}: expected a mapping, got {_shown(values)}")
        self.values: dict[str, Any] = {str(key): value for key, value in values.items()}
        self.where = where

    def expect_only(self, keys: Collection[str]) -> None:
        """Refuse keys that nothing reads: a misspelt key must not be ignored."""
        unknown = [key for key in self.values if key not in keys]
        if unknown:
            raise UsageError(
                f"{self.where}: unknown key {unknown[0]!r}", hint=f"accepted here: {', '.join(sorted(keys))}"
            )

    def section(self, key: str) -> "Section":
        """The mapping under `key`; an absent one is empty."""
        return Section(self.values.get(key, {}), self.at(key))

    def sections(self, key: str) -> Iterator["Section"]:
        """The mappings of the list under `key`."""
        for index, item in enumerate(self._required(key, list, "a list")):
            yield Section(item, f"{self.at(key)}[{index}]")

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        if key not in self.values and default is not None:
            return default
        return str(self._required(key, str, "a string"))

    def number(self, key: str, accepted: str, holds: Callable[[float], bool]) -> float:
        """A finite number for which `holds`; `accepted` says in words which these are."""
        value = self._required(key, (int, float), f"a number {accepted}")
        if isinstance(value, bool) or not holds(value):
            raise self.wrong(key, f"a number {accepted}")
        return float(value)

    def whole(self, key: str, accepted: str, holds: Callable[[int], bool]) -> int:
        """A whole number for which `holds`."""
        value = self._required(key, int, f"a whole number {accepted}")
        if isinstance(value, bool) or not holds(value):
            raise self.wrong(key, f"a whole number {accepted}")
        return int(value)

    def wholes(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self._required(key, list, "a list of whole numbers")
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise self.wrong(key, "a list of whole numbers")
        return tuple(values)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._required(key, list, "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "a list of strings")
        return tuple(values)

    def at(self, key: str) -> str:
        """Where a key of this section stands, for messages."""
        return f"{self.where}: {key}" if self.where.endswith(".yaml") else f"{self.where}.{key}"

    def wrong(self, key: str, accepted: str) -> UsageError:
        """The error for a value that is not what is accepted."""
        return UsageError(f"{self.at(key)}: expected {accepted}, got {_shown(self.values.get(key))}")

    def _required(self, key: str, types: type | tuple[type, ...], accepted: str) -> Any:
        if key not in self.values:
            raise UsageError(f"{self.at(key)}: missing; expected {accepted}")
        value = self.values[key]
        if not isinstance(value, types):
            raise self.wrong(key, accepted)
        return value


def read_yaml(path: Path) -> Section:
    """The file as one section. Raises UsageError for a file that is absent or not YAML."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no preset file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the preset {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return Section(values, str(path) if path.suffix == ".yaml" else f"{path} (.yaml)")


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:60]
