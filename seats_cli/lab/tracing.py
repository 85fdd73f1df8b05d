"""What a trace measures and how that is named. No torch here: the command line checks what was typed with it.

A trace takes the answer that a model gives with all tokens and asks what is left when tokens are missing:

removal    a kind is gone from layer l on. l = 1: the language model never sees it; l = n_layers + 1: all is
           there
choice     after layer d only the best share of both kinds stays, by the last text token's attention there
entry      only stage I's choice of a kind enters, and nothing leaves later
attention  where the last text token looks, layer by layer, with all tokens
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seats_cli.errors import UsageError
from seats_cli.lab.manifest import Sample
from seats_cli.lab.settings import FULL, Setting
from seats_cli.lab.sweep import Asking, ClipTask

CURVES = ("removal", "choice", "entry", "attention")
KINDS = ("video", "audio", "both")
KEEPS = (0.1, 0.25, 0.5)
ENTRIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
DEEP = 20  # layers above which choices are made after every second one

Point = dict[str, Any]
"""What one curve asks at one place: {kind, layer}, {kind, after_layer, keep} or {kind, entry}."""


@dataclass(frozen=True)
class Tracing(Asking):
    """How each question is asked and what is measured. `layers`: 1-based, ascending; None is all of them."""

    curves: tuple[str, ...] = CURVES
    layers: tuple[int, ...] | None = None
    keeps: tuple[float, ...] = KEEPS
    entries: tuple[float, ...] = ENTRIES

    def removal_layers(self, n_layers: int) -> list[int]:
        """From which layers on a kind is removed: those asked for, and 1. UsageError beyond the last."""
        if self.layers is None:
            return list(range(1, n_layers + 1))
        beyond = [layer for layer in self.layers if layer > n_layers]
        if beyond:
            raise UsageError(f"--layers {beyond[0]}: this model has {n_layers} layers")
        return sorted({1, *self.layers})

    def choice_layers(self, n_layers: int) -> list[int]:
        """After which layers a choice is made: those asked for, else all, or every second of more than 20."""
        if self.layers is None:
            return list(range(1, n_layers, 2 if n_layers > DEEP else 1))
        return [layer for layer in self.layers if layer < n_layers]


def full_setting(preset: str | None, settings: Mapping[str, str]) -> Setting:
    """The one setting of a trace: all tokens. Preset and settings tell how stage I chooses."""
    return Setting(FULL, 1.0, preset, tuple(sorted(settings.items())))


def with_fewer_questions(tasks: Iterable[ClipTask], n: int | None) -> list[ClipTask]:
    """At most `n` questions of each clip, such that families come up about equally often; None keeps all."""
    asked: dict[str, int] = {}
    thinned = []
    for task in tasks:
        samples = task.samples if n is None else _least_asked(task.samples, n, asked)
        thinned.append(ClipTask(task.clip, samples, task.made))
    return thinned


def _least_asked(samples: Sequence[Sample], n: int, asked: dict[str, int]) -> tuple[Sample, ...]:
    left = list(samples)
    chosen: list[Sample] = []
    while left and len(chosen) < n:
        sample = min(left, key=lambda one: asked.get(one.family, 0))  # of equals the first
        left.remove(sample)
        chosen.append(sample)
        asked[sample.family] = asked.get(sample.family, 0) + 1
    return tuple(sample for sample in samples if sample in chosen)
