"""What is asked of a session, and what it gives back: frozen, and made anew where something is to differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from seats_cli.engine.decode import DecodeOptions
from seats_cli.engine.encode import EncodedMedia
from seats_cli.measure.report import Report
from seats_cli.media import OpenedClip, Sampling
from seats_cli.model.adapter import MediaShape
from seats_cli.presets import StageOneWindows, TokenCaps
from seats_cli.selection.methods import Method

EMBEDDED_MODEL = "tiny"


@dataclass(frozen=True)
class ModelOptions:
    """Which checkpoint, and how it is loaded; see `model.load.load_model` for what each accepts.

    compile: run the fast paths (`Adapter.fuse`) where they can run, else transformers' own modules
    graphs:  decode with a CUDA graph where the fast paths run on a GPU
    hwaccel: where video is decoded, which changes no frame: "none" the CPU; "cuda" the decoder of an NVIDIA
        GPU, the model's or the first, with a warning where it cannot; "auto" the model's GPU where it can
    """

    model: str = EMBEDDED_MODEL
    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    quantize: str = "none"
    device_map: str = "none"
    revision: str | None = None
    offline: bool = False
    compile: bool = True
    graphs: bool = True
    hwaccel: str = "none"


@dataclass(frozen=True)
class AskOptions:
    """How one question is answered.

    ratio, method, preset, settings: which tokens are kept; `settings` are `--set`'s key=value pairs, and a
        method of one's own may stand where its name would
    max_new_tokens, temperature, top_p, seed: the answer; the seed also drives methods that draw at random
    system: None is the family's own system prompt
    fps, max_frames, start_s, end_s: what of the clip is looked at, seconds from its start
    """

    ratio: float = 0.10
    method: str | Method = "seats"
    preset: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    system: str | None = None
    fps: float = 2.0
    max_frames: int = 768
    start_s: float | None = None
    end_s: float | None = None

    @property
    def sampling(self) -> Sampling:
        """What of the clip is read. Raises UsageError for values that no clip could satisfy."""
        return Sampling(fps=self.fps, max_frames=self.max_frames, start_s=self.start_s, end_s=self.end_s)

    @property
    def decoding(self) -> DecodeOptions:
        """How the answer's tokens are chosen. Raises UsageError for impossible values."""
        return DecodeOptions(self.max_new_tokens, self.temperature, self.top_p, self.seed)


@dataclass(frozen=True)
class ReadClip:
    """A file that was opened, decoded and encoded once, for any number of questions (`Session.read`).

    media, mtime, clip: the file as named, its time of change, and what was used of it (closed by now)
    shape, encoded:     its tokens: how many, and every one of them
    sampling, windows, caps: what all its questions must agree on
    seconds:            from opening it until all of it was encoded
    """

    media: str | Path
    mtime: float
    clip: OpenedClip
    shape: MediaShape
    encoded: EncodedMedia
    sampling: Sampling
    windows: StageOneWindows
    caps: TokenCaps
    seconds: float


@dataclass(frozen=True)
class Answer:
    """The words, and what they cost."""

    text: str
    report: Report
