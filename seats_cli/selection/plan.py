"""The plan of one answer: what is kept of a clip at every layer, as numbers, before anything runs.

A `Plan` is made by a method from a preset, a ratio and a clip's token counts. It is frozen, holds host
numbers only and imports no torch, so it can be shown, stored and compared without a model.
"""

from dataclasses import dataclass
from typing import Literal

from seats_cli.selection.options import SelectionOptions

Kind = Literal["video", "audio"]


def keep_count(ratio: float, n: int) -> int:
    """How many of a stage-I window's n tokens are kept at `ratio`: half to even, at least 1 of any."""
    return min(max(round(ratio * n), 1), n)


def keep_total(ratio: float, n: int) -> int:
    """How many of a kind's n tokens a middle drop keeps: half to even; at least 1 of any, but none at 0."""
    return max(1, round(ratio * n)) if n and ratio else 0


def spread_total(ratio: float, n: int, window: int) -> int:
    """How many of n tokens stage I keeps when windows share their rounding: one a window at least."""
    return min(max(round(ratio * n), -(-n // window)), n)


@dataclass(frozen=True)
class ClipCounts:
    """What planning must know of a laid-out prompt, all of it known before a pixel is decoded.

    n_video, n_audio: tokens of each kind before any selection (0 for an absent kind)
    tokens_per_grid:  video tokens of one temporal grid (two frames); 0 without video
    n_windows:        windows of the layout, that is the largest window id + 1
    n_text:           the rest of the prompt; only the report's compute needs it
    """

    n_video: int
    n_audio: int
    tokens_per_grid: int
    n_windows: int
    n_text: int = 0


@dataclass(frozen=True)
class DropStep:
    """A middle drop: after layer `after_layer` (1-based) keep these fractions of what is still there.

    At 0 the kind is gone from there on; above 0 at least one token of it stays.
    """

    after_layer: int
    keep_video: float
    keep_audio: float


@dataclass(frozen=True)
class Stage:
    """One point where tokens may leave, with the counts expected from there on (text never leaves).

    name: "stage I", "after layer 16", ..., "late"; the report's row names
    after_layer: 0 for stage I (before the first layer), else the 1-based layer after which it happens
    """

    name: str
    after_layer: int
    n_video: int
    n_audio: int


@dataclass(frozen=True)
class Plan:
    """What one answer keeps: entry ratios per kind, middle drops, late layer, and what that comes to.

    Layers are 1-based: a drop "after layer d" takes effect from layer d + 1 on, and `late_layer` is the first
    layer that sees text only (None: none does).

    ratio:             the asked mean over layers of (video + audio tokens processed / before selection)
    retention_video, retention_audio: the same per kind, chosen so that this clip's total meets `ratio`
    entry_video, entry_audio: the fraction of each window that stage I keeps; 1.0 keeps all
    video_window, audio_window: tokens in a whole stage-I window of that kind; the last may be shorter
    spread_entry:      False: each window rounds its own keep (the paper's stage I); True: windows
                       share their rounding, one token each at least, so that a kind's total is exact
    stages:            where tokens leave and how many are expected to be left, in order, stage I first;
                       empty if nothing is ever dropped
    expected_retention: `ratio` as it comes out in whole tokens on this clip
    needs_saliency:    whether before_llm reads the encoders' saliency at all
    score_layers:      the 1-based layers whose `after_layer` call needs last-token attention scores
    notes:             reasons for automatic choices, for --verbose
    """

    method: str
    preset: str
    ratio: float
    n_layers: int
    n_video: int
    n_audio: int
    n_windows: int
    tokens_per_grid: int
    retention_video: float
    retention_audio: float
    entry_video: float
    entry_audio: float
    video_window: int
    audio_window: int
    drops: tuple[DropStep, ...]
    late_layer: int | None
    stages: tuple[Stage, ...]
    expected_retention: float
    options: SelectionOptions
    needs_saliency: bool
    score_layers: tuple[int, ...]
    spread_entry: bool = False
    notes: tuple[str, ...] = ()

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped: the answer is then the stock model's."""
        return not self.stages

    @property
    def cut_layers(self) -> tuple[int, ...]:
        """The 1-based layers after which `Method.after_layer` must be called, in order."""
        return tuple(stage.after_layer for stage in self.stages if stage.after_layer)

    def drop_after(self, layer: int) -> DropStep | None:
        """The middle drop after `layer` (1-based), if there is one."""
        return next((drop for drop in self.drops if drop.after_layer == layer), None)

    def entry(self, kind: Kind) -> float:
        """Stage I's keep ratio of a kind."""
        return self.entry_video if kind == "video" else self.entry_audio

    def window(self, kind: Kind) -> int:
        """Tokens in a whole stage-I window of a kind."""
        return self.video_window if kind == "video" else self.audio_window

    def count(self, kind: Kind) -> int:
        """Tokens of a kind before any selection."""
        return self.n_video if kind == "video" else self.n_audio

    def keeps_in(self, kind: Kind, first_token: int, n_tokens: int) -> list[tuple[int, int]]:
        """(size, keep) of each stage-I window among `n_tokens` tokens of a kind that start at `first_token`.

        Only whole windows may be asked for; the clip's last one may be short. Raises ValueError otherwise.
        """
        window, n = self.window(kind), self.count(kind)
        end = first_token + n_tokens
        if first_token % window or end > n or (end % window and end != n):
            raise ValueError(
                f"{kind} tokens {first_token} to {end} of {n} are not whole windows of {window} tokens"
            )
        ratio = self.entry(kind)
        sizes = [min(window, end - start) for start in range(first_token, end, window)]
        if not self.spread_entry:
            return [(size, keep_count(ratio, size)) for size in sizes]
        total, n_windows = spread_total(ratio, n, window), -(-n // window)
        # one token for every window, and of the rest by whole numbers what is due up to each window's end
        spare, room = total - n_windows, max(n - n_windows, 1)
        first = first_token // window
        indices = range(first, first + len(sizes) + 1)
        due = [spare * (min(index * window, n) - index) // room for index in indices]
        return [(size, 1 + due[index + 1] - due[index]) for index, size in enumerate(sizes)]
