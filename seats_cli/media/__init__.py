"""A path becomes frames and samples: probing, sampling, decoding. NumPy and PyAV only; see `Clip`."""

from .audio import SAMPLE_RATE
from .clip import Clip, MediaInfo, open_clip
from .limits import NO_LIMITS, Limits
from .nvdec import VideoDecoding, check_hwaccel, choose_decoding
from .opening import DistantOpener, OpenedClip, Opener
from .process import DecoderProcess
from .sampling import Sampling, parse_time
from .video import MediaWindow

__all__ = [
    "NO_LIMITS",
    "SAMPLE_RATE",
    "Clip",
    "DecoderProcess",
    "DistantOpener",
    "Limits",
    "MediaInfo",
    "MediaWindow",
    "OpenedClip",
    "Opener",
    "Sampling",
    "VideoDecoding",
    "check_hwaccel",
    "choose_decoding",
    "open_clip",
    "parse_time",
]
