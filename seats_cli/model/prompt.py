"""The token sequence of a question about a clip, and the 3-D rotary position of each token.

Vectorised; equal by test to transformers' own processor (the tokens) and `get_rope_index` (the positions).
Windows are written down here, once, and travel with the tokens ever after (docs/method.md, "Words").
"""

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
    """

    ids_per_s: float
    window_s: float
    audio_tokens_per_s: float
    merge: int

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


def _vision_position(grid: tuple[int, int, int], merge: int, time: torch.Tensor, start: int) -> torch.Tensor:
    """(3, t * h * w) of the tokens of t grids of h x w tokens: time, row and column, all from `start`."""
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes]).reshape(3, t * h * w) + start


def _video_stretch(shape: MediaShape, rule: PositionRule, token: int, start: int) -> _Stretch:
    assert shape.video_grid is not None
    grids = torch.arange(shape.video_grid[0])
    # HF's model computes positions in float32, its processor windows in float64: follow each.
    time = (grids * torch.tensor(shape.seconds_per_grid, dtype=torch.float32) * rule.ids_per_s).long()
    exact = grids.double() * shape.seconds_per_grid * rule.ids_per_s
    per_grid = shape.tokens_per_grid
    return _stretch(
        torch.full((shape.n_video,), token),
        VIDEO,
        _vision_position(shape.video_grid, rule.merge, time, start),
        window_index(exact.repeat_interleave(per_grid), rule.ids_per_window),
        (grids.double() * shape.seconds_per_grid).repeat_interleave(per_grid),
    )


def _audio_stretch(shape: MediaShape, rule: PositionRule, token: int, start: int) -> _Stretch:
    index = torch.arange(shape.n_audio)
    return _stretch(
        torch.full((shape.n_audio,), token),
        AUDIO,
        (index + start).expand(3, -1),
        window_index(index.double(), rule.ids_per_window),
        index.double() / rule.audio_tokens_per_s,
    )


@dataclass
class _Sequence:
    """A prompt under construction; `next_position` is where the next text token stands."""

    stretches: list[_Stretch] = field(default_factory=list)
    next_position: int = 0

    def text(self, ids: list[int]) -> None:
        tokens = torch.tensor(ids, dtype=torch.int64)
        position = torch.arange(self.next_position, self.next_position + len(ids)).expand(3, -1)
        self.stretches.append(_stretch(tokens, TEXT, position, None, None))
        self.next_position += len(ids)

    def together(self, ids: list[int]) -> None:
        """Text tokens that share one position (the two marks around video with audio)."""
        tokens = torch.tensor(ids, dtype=torch.int64)
        position = torch.full((3, len(ids)), self.next_position)
        self.stretches.append(_stretch(tokens, TEXT, position, None, None))
        self.next_position += 1

    def media(self, stretch: _Stretch, after: int | None = None) -> None:
        """Media tokens; `after` is the largest position that the text after them must exceed."""
        self.stretches.append(stretch)
        self.next_position = (int(stretch.position.max()) if after is None else after) + 1


def _interleave(video: _Stretch, audio: _Stretch) -> tuple[_Stretch, int]:
    """Window by window, a window's video then its audio; also the largest position of the last piece."""
    joined = _join([video, audio])
    key = joined.window.long() * 2 + (joined.kind == AUDIO).long()
    order = torch.argsort(key, stable=True)
    # HF goes on from the last piece alone, even where an earlier one reaches further.
    last_piece = joined.position[:, key == key.max()]
    return joined.take(order), int(last_piece.max())


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
    """The chat of one question in Qwen2.5-Omni's format: media first, then the text.

    `system` None leaves the system turn out. Tensors on the CPU.
    """
    sequence = _Sequence()
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
    return Prompt(whole.ids, layout, image_slots, int(whole.position.max()) + 1)


def _lay_out_media(sequence: _Sequence, special: SpecialIds, rule: PositionRule, shape: MediaShape) -> None:
    if shape.n_image:
        assert shape.image_grid is not None
        sequence.text([special.vision_bos])
        ids = torch.full((shape.n_image,), special.image)
        time = torch.zeros(1, dtype=torch.int64)
        position = _vision_position(shape.image_grid, rule.merge, time, sequence.next_position)
        sequence.media(_stretch(ids, TEXT, position, None, None))
        sequence.text([special.vision_eos])
    if shape.n_video and shape.n_audio:
        sequence.together([special.vision_bos, special.audio_bos])
        start = sequence.next_position
        video = _video_stretch(shape, rule, special.video, start)
        audio = _audio_stretch(shape, rule, special.audio, start)
        sequence.media(*_interleave(video, audio))
        sequence.together([special.audio_eos, special.vision_eos])
    elif shape.n_video:
        sequence.text([special.vision_bos])
        sequence.media(_video_stretch(shape, rule, special.video, sequence.next_position))
        sequence.text([special.vision_eos])
    elif shape.n_audio:
        sequence.text([special.audio_bos])
        sequence.media(_audio_stretch(shape, rule, special.audio, sequence.next_position))
        sequence.text([special.audio_eos])
