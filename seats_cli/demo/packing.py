"""The static tensors of training: the prompt before the question, and the vision tower's window order.

Both come from the code that `seats ask` runs, so that training and answering cannot drift apart.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seats_cli.model.adapter import MediaShape
from seats_cli.model.omni import read_special_ids
from seats_cli.model.prompt import PositionRule, lay_out
from seats_cli.model.qwen2_5_omni import DEFAULT_SYSTEM, SPECIAL_TOKENS
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO


@dataclass(frozen=True)
class Prefix:
    """P prompt tokens that all questions of a clip share.

    ids: (P,) int64; is_av: (P,) bool; video_slots, audio_slots: their indices, in time order;
    position: (3, P) int64; audio_time: (A,) seconds at the middle of each audio token;
    next_position: where every question block starts.
    """

    ids: Tensor
    is_av: Tensor
    video_slots: Tensor
    audio_slots: Tensor
    position: Tensor
    audio_time: Tensor
    next_position: int

    @property
    def first(self) -> int:
        """The first token after the last audio-visual one: two closing marks end the prefix."""
        return len(self.ids) - 2


@dataclass(frozen=True)
class VisionGrid:
    """Order and rotary angles of a grid's patches, by window (see `TrainingForward.encode_video`)."""

    window_index: Tensor
    cos: Tensor
    sin: Tensor
    window: int


def vision_grid(thinker: Any, frame_size: int, device: torch.device) -> VisionGrid:
    """The vision tower's own window order for a grid of square frames; whole windows only."""
    config = thinker.config.vision_config
    side = frame_size // config.patch_size
    merged = side // config.spatial_merge_size
    per_window = config.window_size // config.patch_size // config.spatial_merge_size
    if merged % per_window:
        raise ValueError(
            f"frames of {frame_size} px do not split into whole windows of {config.window_size} px"
        )
    order = torch.arange(merged * merged).view(
        merged // per_window, per_window, merged // per_window, per_window
    )
    window_index = order.permute(0, 2, 1, 3).flatten()
    blocks = torch.arange(side).view(merged, config.spatial_merge_size)
    rows = blocks[:, None, :, None].expand(-1, merged, -1, config.spatial_merge_size)
    columns = blocks[None, :, None, :].expand(merged, -1, config.spatial_merge_size, -1)
    position = torch.stack([rows.reshape(merged * merged, -1), columns.reshape(merged * merged, -1)])
    position = position[:, window_index].flatten(1).to(device)
    cos, sin = thinker.model.visual.rotary_pos_emb(position, position.T)
    window = per_window**2 * config.spatial_merge_size**2
    return VisionGrid(window_index.to(device), cos.float(), sin.float(), window)


def prefix_for(config: Any, tokenizer: Any, seconds: float, frame_size: int, device: torch.device) -> Prefix:
    """The prompt before the question, for `seconds` of 2 frames and 25 sound tokens a second."""
    side = frame_size // config.vision_config.patch_size
    grids, n_audio = round(seconds), round(seconds * 25)
    merge = config.vision_config.spatial_merge_size
    shape = MediaShape(
        video_grid=(grids, side, side),
        seconds_per_grid=1.0,
        audio_frames=round(seconds * 100),
        n_video=grids * (side // merge) ** 2,
        n_audio=n_audio,
    )
    rule = PositionRule(config.position_id_per_seconds, config.seconds_per_chunk, 25.0, merge)
    special = read_special_ids(config, tokenizer, SPECIAL_TOKENS)
    prompt = lay_out(tokenizer, special, rule, shape, "", DEFAULT_SYSTEM)
    # What follows the media is the question's to begin; with an empty one it is the end of the user's turn.
    length = int((prompt.layout.kind != TEXT).nonzero().max()) + 3
    kind = prompt.layout.kind[:length]
    if bool((kind[-2:] != TEXT).any()) or bool(kind[-3] == TEXT):
        raise ValueError("the prompt's media are expected to end with two closing marks")
    return Prefix(
        ids=prompt.input_ids[:length].to(device),
        is_av=(kind != TEXT).to(device),
        video_slots=(kind == VIDEO).nonzero().squeeze(1).to(device),
        audio_slots=(kind == AUDIO).nonzero().squeeze(1).to(device),
        position=prompt.layout.position[:, :length].to(device),
        audio_time=((torch.arange(n_audio) + 0.5) / 25.0).to(device),
        next_position=int(prompt.layout.position[:, :length].max()) + 1,
    )
