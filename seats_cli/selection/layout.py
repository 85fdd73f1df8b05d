"""Where every token of a prompt comes from: kind, window, rotary position, time.

A layout travels with the tensors that it describes. Windows are carried explicitly from the moment the
prompt is laid out and are never guessed from contiguous runs (docs/method.md, "Words").
"""

from dataclasses import dataclass

import torch

from seats_cli.selection.transfer import on_device

TEXT, VIDEO, AUDIO = 0, 1, 2
KIND_NAMES = ("text", "video", "audio")


@dataclass(frozen=True)
class TokenLayout:
    """One row per token of a sequence of S tokens, all tensors on one device.

    kind:     (S,) int8, 0 text (everything that is neither: special and image tokens too), 1 video, 2 audio
    window:   (S,) int32, the stretch of time in which a token stands; -1 for text
    position: (3, S) int64, or float32 where a family's positions are fractions of a step: the 3-D rotary
              position (time, height, width)
    time_s:   (S,) float32, seconds from the start of what is heard and seen; 0 for text
    counts:   tokens of each kind (text, video, audio), known on the host
    """

    kind: torch.Tensor
    window: torch.Tensor
    position: torch.Tensor
    time_s: torch.Tensor
    counts: tuple[int, int, int]

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def n_text(self) -> int:
        return self.counts[TEXT]

    @property
    def n_video(self) -> int:
        return self.counts[VIDEO]

    @property
    def n_audio(self) -> int:
        return self.counts[AUDIO]

    def subset(self, keep: torch.Tensor, counts: tuple[int, int, int] | None = None) -> "TokenLayout":
        """The layout of the tokens at `keep` (K,) int64, sorted; `counts` spares the device-to-host sync."""
        kind = self.kind[keep]
        if counts is None:
            per_kind = torch.bincount(kind.to(torch.int64), minlength=3).tolist()
            counts = (per_kind[TEXT], per_kind[VIDEO], per_kind[AUDIO])
        return TokenLayout(kind, self.window[keep], self.position[:, keep], self.time_s[keep], counts)

    def to(self, device: torch.device | str) -> "TokenLayout":
        """The same layout on another device."""
        return TokenLayout(
            on_device(self.kind, device),
            on_device(self.window, device),
            on_device(self.position, device),
            on_device(self.time_s, device),
            self.counts,
        )
