"""A run that its file has all answers of needs no model: what only a loaded one can tell was noted there.

The first record that a run writes carries the note, as `run`, under a key of all that decides it and can be
known without loading: the weights' content, the code, the libraries, the devices, the settings with their
presets as they are now. A checkpoint of the hub is loaded all the same: only that says which revision it is.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from seats_cli import __version__
from seats_cli.lab.records import Record, RecordFile
from seats_cli.lab.settings import Setting
from seats_cli.lab.sweep import Asking, ClipTask, Described, Job, Listener, code_digest, weights_fingerprint
from seats_cli.presets import load_any

SAME_ANSWERS = ("offline", "hwaccel")  # keywords of ModelOptions that change no answer
LIBRARIES = ("torch", "transformers", "av")


def run_key(
    model: Mapping[str, Any], settings: Sequence[Setting], asking: Asking, devices: Sequence[str]
) -> str | None:
    """What such a run is noted under; None where that takes the model. `model`: keywords of ModelOptions."""
    weights = weights_fingerprint(model["model"])
    if weights is None:
        return None
    presets = {setting.preset for setting in settings if setting.preset is not None}
    about = {
        "seats": __version__,
        "code": code_digest(),
        "libraries": [version(name) for name in LIBRARIES],
        "machine": [platform.node(), platform.machine(), *_cards()],
        "weights": weights,
        "model": {key: value for key, value in model.items() if key not in SAME_ANSWERS},
        "devices": list(devices),
        "settings": [asdict(setting) for setting in settings],
        "presets": {name: repr(load_any(name)) for name in sorted(presets)},
        "asking": [type(asking).__name__, asdict(asking)],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def noted(file: RecordFile | None, key: str | None) -> Described | None:
    """What the file knows of the model of a run like this one."""
    facts = {} if file is None or key is None else file.runs.get(key, {})
    parts = [facts.get(name) for name in ("model", "environment", "resolved")]
    if not (isinstance(parts[0], dict) and isinstance(parts[1], dict) and isinstance(parts[2], list)):
        return None
    return Described(parts[0], parts[1], tuple(parts[2]))


def note(file: RecordFile | None, key: str | None, described: Described) -> None:
    """Leave that for later runs."""
    if file is not None and key is not None:
        file.note_run(key, asdict(described))


@dataclass(frozen=True)
class Finished:
    """The team of a run in which nothing is left to do: it says who did it, and answers nothing."""

    described: Described
    size: int

    def run(
        self, work: Sequence[tuple[ClipTask, tuple[Job, ...]]], listener: Listener
    ) -> Iterator[tuple[int, Job, Record]]:
        """Nothing; ValueError where there is something."""
        if work:
            raise ValueError("there are questions left, and no model to answer them")
        return iter(())


def _cards() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
