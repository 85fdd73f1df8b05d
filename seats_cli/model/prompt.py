"""The token sequence of a question about a clip, and the 3-D rotary position of each token.

Vectorised; equal by test to transformers' own processor (the tokens) and `get_rope_index` (the positions).
Windows are written down here, once, and travel with the tokens ever after (docs/method.md, "Words").
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from seats_cli.errors import ModelError
from seats_cli.model.adapter import MediaShape, Prompt
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that structure a prompt."""

    im_start: int
    im_end: int
    vision_bos: int
    vision_eos: int
    audio_bos: int
    audio_eos: int
    image: int
    video: int
    audio: int


@dataclass(frozen=True)
class PositionRule:
    """How time becomes positions and windows; all from the checkpoint's config.

    ids_per_s: rotary positions in a second; window_s: seconds in a window; audio_tokens_per_s: of the encoder
    by_time:   False: video and audio follow each other window by window, a grid's position is a whole number
               and the two marks on either side of them share one (Qwen2.5-Omni). True: they are merged by
               time, a window is a grid with the audio up to the next one, and positions may be fractions
               (Qwen3-Omni); `window_s` then counts where there is no video.
    """

    ids_per_s: float
    window_s: float
    audio_tokens_per_s: float
    merge: int
    by_time: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of positions: int64, or the float32 in which transformers computes fractions."""
        return torch.float32 if self.by_time else torch.int64

    @property
    def ids_per_window(self) -> int:
        """Rotary positions in a window."""
        return int(self.ids_per_s * self.window_s)


def window_index(time_position: torch.Tensor, ids_per_window: int) -> torch.Tensor:
    """The window of each token of one kind, (N,) int64, from its time position (N,) float64, ascending.

    A token opens the next window when its position reaches that window's start, and it opens at most one:
    with grids further apart than a window (low frame rates), windows lag behind and hold a single token until
    they have caught up. That is what the model saw in training, so it is kept; in closed form,
    window_i = i + min over j <= i of (floor(position_j / ids_per_window) - j).
    """
    reached = torch.floor(time_position / ids_per_window)
    reached -= (reached * ids_per_window > time_position).to(reached.dtype)
    reached += ((reached + 1) * ids_per_window <= time_position).to(reached.dtype)
    order = torch.arange(time_position.numel(), dtype=torch.int64)
    if not order.numel():
        return order
    return torch.cummin(reached.to(torch.int64) - order, dim=0).values + order


@dataclass(frozen=True)
class _Stretch:
    """Consecutive tokens: ids (n,), kind, window (n,), position (3, n), time_s (n,)."""

    ids: torch.Tensor
    kind: torch.Tensor
    window: torch.Tensor
    position: torch.Tensor
    time_s: torch.Tensor

    def take(self, order: torch.Tensor) -> "_Stretch":
        return _Stretch(
            self.ids[order], self.kind[order], self.window[order], self.position[:, order], self.time_s[order]
        )


def _join(stretches: list[_Stretch]) -> _Stretch:
    return _Stretch(
        torch.cat([s.ids for s in stretches]),
        torch.cat([s.kind for s in stretches]),
        torch.cat([s.window for s in stretches]),
        torch.cat([s.position for s in stretches], dim=1),
        torch.cat([s.time_s for s in stretches]),
    )


def _stretch(
    ids: torch.Tensor,
    kind: int,
    position: torch.Tensor,
    window: torch.Tensor | None,
    time_s: torch.Tensor | None,
) -> _Stretch:
    n = ids.numel()
    return _Stretch(
        ids,
        torch.full((n,), kind, dtype=torch.int8),
        torch.full((n,), -1, dtype=torch.int32) if window is None else window.to(torch.int32),
        position,
        torch.zeros(n) if time_s is None else time_s.to(torch.float32),
    )


def _vision_position(
    grid: tuple[int, int, int], merge: int, time: torch.Tensor, start: float
) -> torch.Tensor:
    """(3, t * h * w) of the tokens of t grids of h x w tokens: time, row and column, all from `start`."""
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    rows, columns = (torch.arange(n, dtype=time.dtype) for n in (h, w))
    axes = torch.meshgrid(time, rows, columns, indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes]).reshape(3, t * h * w) + start


def _grid_times(shape: MediaShape, rule: PositionRule) -> torch.Tensor:
    """Where each grid stands in positions from the start of the clip: (t,) float64, as HF's processors count
    to interleave; its models count the positions themselves in float32."""
    assert shape.video_grid is not None
    return torch.arange(shape.video_grid[0]).double() * shape.seconds_per_grid * rule.ids_per_s


def _video_stretch(shape: MediaShape, rule: PositionRule, token: int, start: float) -> _Stretch:
    assert shape.video_grid is not None
    grids = torch.arange(shape.video_grid[0])
    time = grids * torch.tensor(shape.seconds_per_grid, dtype=torch.float32) * rule.ids_per_s
    per_grid = shape.tokens_per_grid
    if rule.by_time:
        window = grids.repeat_interleave(per_grid)
    else:
        window = window_index(_grid_times(shape, rule).repeat_interleave(per_grid), rule.ids_per_window)
    return _stretch(
        torch.full((shape.n_video,), token),
        VIDEO,
        _vision_position(shape.video_grid, rule.merge, time.to(rule.dtype), start),
        window,
        (grids.double() * shape.seconds_per_grid).repeat_interleave(per_grid),
    )


def _audio_stretch(shape: MediaShape, rule: PositionRule, token: int, start: float) -> _Stretch:
    index = torch.arange(shape.n_audio)
    if rule.by_time and shape.n_video:
        window = _windows_of_grids(index, _grid_times(shape, rule), shape.seconds_per_grid * rule.ids_per_s)
    else:
        window = window_index(index.double(), rule.ids_per_window)
    return _stretch(
        torch.full((shape.n_audio,), token),
        AUDIO,
        (index.to(rule.dtype) + start).expand(3, -1),
        window,
        index.double() / rule.audio_tokens_per_s,
    )


def _windows_of_grids(position: torch.Tensor, grids: torch.Tensor, step: float) -> torch.Tensor:
    """The last grid that starts at or before each audio token, (N,) int64.

    position: (N,), from 0 in steps of 1; grids: (t,) float64, `step` apart. Sound that outlasts the video
    goes on in windows as long as a grid, or of one token where grids are shorter, so that none is empty."""
    step = max(step, 1.0)
    n_more = max(0, math.ceil((len(position) - float(grids[-1])) / step))
    starts = torch.cat((grids, grids[-1] + step * torch.arange(1, n_more + 1, dtype=torch.float64)))
    return torch.searchsorted(starts, position.double(), right=True) - 1


@dataclass
class _Sequence:
    """A prompt under construction; `next_position` is where the next text token stands."""

    dtype: torch.dtype
    stretches: list[_Stretch] = field(default_factory=list)
    next_position: float = 0

    def text(self, ids: list[int]) -> None:
        tokens = torch.tensor(ids, dtype=torch.int64)
        position = (torch.arange(len(ids), dtype=self.dtype) + self.next_position).expand(3, -1)
        self.stretches.append(_stretch(tokens, TEXT, position, None, None))
        self._go_on(self.next_position + len(ids))

    def together(self, ids: list[int]) -> None:
        """Text tokens that share one position (the two marks around video with audio)."""
        tokens = torch.tensor(ids, dtype=torch.int64)
        position = torch.full((3, len(ids)), self.next_position, dtype=self.dtype)
        self.stretches.append(_stretch(tokens, TEXT, position, None, None))
        self._go_on(self.next_position + 1)

    def media(self, stretch: _Stretch, after: float | None = None) -> None:
        """Media tokens; `after` is the largest position that the text after them must exceed."""
        self.stretches.append(stretch)
        self._go_on((stretch.position.max().item() if after is None else after) + 1)

    def _go_on(self, position: float) -> None:
        self.next_position = torch.tensor(position, dtype=self.dtype).item()  # rounded as the tensors are


def _interleave(video: _Stretch, audio: _Stretch) -> tuple[_Stretch, float]:
    """Window by window, a window's video then its audio; also the largest position of the last piece."""
    joined = _join([video, audio])
    key = joined.window.long() * 2 + (joined.kind == AUDIO).long()
    order = torch.argsort(key, stable=True)
    # HF goes on from the last piece alone, even where an earlier one reaches further.
    last_piece = joined.position[:, key == key.max()]
    return joined.take(order), last_piece.max().item()


def _merge_by_time(
    video: _Stretch, audio: _Stretch, shape: MediaShape, rule: PositionRule
) -> tuple[_Stretch, float]:
    """In the order of time, video first on ties; also the largest position of the run that ends it.

    HF merges the tokens in float64 and their positions in float32, which can part them where a grid and an
    audio token tie; here a token has its own position always.
    """
    grids = _grid_times(shape, rule).repeat_interleave(shape.tokens_per_grid)
    time = torch.cat((grids, torch.arange(shape.n_audio, dtype=torch.float64)))
    order = torch.argsort(time, stable=True)
    merged = _join([video, audio]).take(order)
    changes = (merged.kind.diff() != 0).nonzero()
    last_run = merged.position[:, int(changes[-1]) + 1 :]
    return merged, last_run.max().item()


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's text; what looks like a special token in it stays plain text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def lay_out(
    tokenizer: Any,
    special: SpecialIds,
    rule: PositionRule,
    shape: MediaShape,
    question: str,
    system: str | None,
) -> Prompt:
    """The chat of one question in the Omni families' format: media first, then the text.

    `system` None leaves the system turn out. Tensors on the CPU.
    """
    sequence = _Sequence(rule.dtype)
    turn_end = [special.im_end, *plain_ids(tokenizer, "\n")]
    if system is not None:
        sequence.text([special.im_start, *plain_ids(tokenizer, "system\n" + system), *turn_end])
    has_media = bool(shape.n_image or shape.n_video or shape.n_audio)
    if has_media:
        sequence.text([special.im_start, *plain_ids(tokenizer, "user\n")])
        _lay_out_media(sequence, special, rule, shape)
        sequence.text(plain_ids(tokenizer, question))
    else:
        # One call, because a tokenizer may merge across the line break.
        sequence.text([special.im_start, *plain_ids(tokenizer, "user\n" + question)])
    sequence.text([*turn_end, special.im_start, *plain_ids(tokenizer, "assistant\n")])
    whole = _join(sequence.stretches)
    n_media = shape.n_video + shape.n_audio
    layout = TokenLayout(
        whole.kind,
        whole.window,
        whole.position.contiguous(),
        whole.time_s,
        (whole.ids.numel() - n_media, shape.n_video, shape.n_audio),
    )
    image_slots = (whole.ids == special.image).nonzero().squeeze(1)
    if image_slots.numel() != shape.n_image:
        raise ModelError(f"the prompt holds {image_slots.numel()} image tokens, not {shape.n_image}")
    return Prompt(whole.ids, layout, image_slots, (whole.position.max() + 1).item())


def _lay_out_media(sequence: _Sequence, special: SpecialIds, rule: PositionRule, shape: MediaShape) -> None:
    if shape.n_image:
        assert shape.image_grid is not None
        sequence.text([special.vision_bos])
        ids = torch.full((shape.n_image,), special.image)
        time = torch.zeros(1, dtype=rule.dtype)
        position = _vision_position(shape.image_grid, rule.merge, time, sequence.next_position)
        sequence.media(_stretch(ids, TEXT, position, None, None))
        sequence.text([special.vision_eos])
    if shape.n_video and shape.n_audio:
        marks = sequence.text if rule.by_time else sequence.together
        marks([special.vision_bos, special.audio_bos])
        start = sequence.next_position
        video = _video_stretch(shape, rule, special.video, start)
        audio = _audio_stretch(shape, rule, special.audio, start)
        merged = _merge_by_time(video, audio, shape, rule) if rule.by_time else _interleave(video, audio)
        sequence.media(*merged)
        marks([special.audio_eos, special.vision_eos])
    elif shape.n_video:
        sequence.text([special.vision_bos])
        sequence.media(_video_stretch(shape, rule, special.video, sequence.next_position))
        sequence.text([special.vision_eos])
    elif shape.n_audio:
        sequence.text([special.audio_bos])
        sequence.media(_audio_stretch(shape, rule, special.audio, sequence.next_position))
        sequence.text([special.audio_eos])
