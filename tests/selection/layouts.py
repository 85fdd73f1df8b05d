"""Layouts for the tests of this room: windows of video then audio, text around them."""

from collections.abc import Sequence

import torch

from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.plan import ClipCounts


def make_layout(
    n_video: Sequence[int], n_audio: Sequence[int], n_before: int = 3, n_after: int = 5
) -> TokenLayout:
    """Text, then per window its video and its audio tokens, then text."""
    kind, window = [TEXT] * n_before, [-1] * n_before
    for index, (videos, audios) in enumerate(zip(n_video, n_audio, strict=True)):
        kind += [VIDEO] * videos + [AUDIO] * audios
        window += [index] * (videos + audios)
    kind += [TEXT] * n_after
    window += [-1] * n_after
    n_tokens = len(kind)
    return TokenLayout(
        torch.tensor(kind, dtype=torch.int8),
        torch.tensor(window, dtype=torch.int32),
        torch.arange(n_tokens).expand(3, -1).contiguous(),
        torch.zeros(n_tokens),
        (n_before + n_after, sum(n_video), sum(n_audio)),
    )


def clip_layout(counts: ClipCounts, video_window: int, audio_window: int) -> TokenLayout:
    """A clip's prompt, its windows of so many tokens of each kind until there are none left."""

    def sizes(n_tokens: int, window: int) -> list[int]:
        return [min(window, max(0, n_tokens - index * window)) for index in range(counts.n_windows)]

    return make_layout(sizes(counts.n_video, video_window), sizes(counts.n_audio, audio_window))
