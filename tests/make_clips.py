"""Small media files for tests, written with PyAV: nothing is downloaded and no ffmpeg binary is needed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE = 48_000
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def pictures(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """(count,H,W,3) uint8: red, green, blue, black in reading order, and a bar that moves each frame."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, : height // 2, : width // 2, 0] = 200
    frames[:, : height // 2, width // 2 :, 1] = 200
    frames[:, height // 2 :, : width // 2, 2] = 200
    for index in range(count):
        frames[index, height * 3 // 4 :, (3 * index) % width] = 255
        frames[index, height // 2 : height * 3 // 4, width // 2 :] = (37 * index) % 256
    return frames


def tone(seconds: float, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """(channels, n) float32: a rising tone on every channel, of another pitch and loudness on each."""
    t = np.arange(round(seconds * rate)) / rate
    return np.stack(
        [0.3 / (c + 1) * np.sin(2 * np.pi * (220 * (c + 1) + 40 * t) * t) for c in range(channels)]
    ).astype(np.float32)


def write_clip(
    path: Path,
    frames: np.ndarray | None = None,
    *,
    fps: int = 30,
    times_s: Sequence[float] | None = None,
    start_s: float = 0.0,
    gop: int = 12,
    b_frames: int = 0,
    rotation: int = 0,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    x264: str = "",
    audio: np.ndarray | Sequence[np.ndarray] | None = None,
    audio_start_s: float = 0.0,
    audio_rate: int = RATE,
    audio_codec: str = "aac",
    languages: Sequence[str] = (),
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes frames (T,H,W,3) uint8 and audio (channels, n) float32, or several tracks; returns `path`.

    `times_s` gives each frame its own time (variable rate); `rotation` is the display matrix,
    counterclockwise. Single-slice H.264, as cameras write it: PyAV's default of many slices flatters threaded
    decoding.
    """
    tracks = [] if audio is None else [audio] if isinstance(audio, np.ndarray) else list(audio)
    with av.open(str(path), "w", options=container_options or {}) as container:
        video: Any = None
        if frames is not None:
            video = container.add_stream(codec, rate=fps)
            video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], pixel_format
            video.options = {"g": str(gop), "bf": str(b_frames)}
            if codec == "libx264":
                params = f"sliced-threads=0:slices=1:keyint={gop}:min-keyint={gop}:scenecut=0"
                video.options |= {"preset": "veryfast", "x264-params": params + (":" + x264 if x264 else "")}
            if times_s is not None:
                video.codec_context.time_base = Fraction(1, 1000)
            if rotation:
                video.set_display_rotation(rotation)
        sounds = []
        for index, samples in enumerate(tracks):
            layout = LAYOUTS[len(samples)]
            sounds.append(container.add_stream(audio_codec, rate=audio_rate, layout=layout))
            if languages:
                sounds[-1].metadata["language"] = languages[index]
        for index, picture in enumerate(frames if frames is not None else ()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_s is not None:
                frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * (start_s + times_s[index]))
            else:
                frame.time_base, frame.pts = Fraction(1, fps), index + round(start_s * fps)
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode())
        for sound, samples in zip(sounds, tracks, strict=True):
            _encode_audio(container, sound, samples, audio_rate, audio_start_s)
    return path


def _encode_audio(container: Any, stream: Any, samples: np.ndarray, rate: int, start_s: float) -> None:
    context = stream.codec_context
    layout = LAYOUTS[len(samples)]
    fit = av.AudioResampler(
        format=context.format, layout=layout, rate=rate, frame_size=context.frame_size or 0
    )
    offset = round(start_s * rate)
    for first in range(0, samples.shape[1], 4800):
        part = np.ascontiguousarray(samples[:, first : first + 4800].T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(part, format="flt", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), first + offset
        for fitted in fit.resample(frame):
            container.mux(stream.encode(fitted))
    for fitted in fit.resample(None):
        container.mux(stream.encode(fitted))
    container.mux(stream.encode())


def write_picture(path: Path, pixels: np.ndarray, codec: str, pixel_format: str) -> Path:
    """Writes one picture, (H,W,3) or (H,W,4) uint8, with the named encoder."""
    with av.open(str(path), "w", format="image2" if path.suffix != ".gif" else "gif") as container:
        stream: Any = container.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = pixels.shape[1], pixels.shape[0], pixel_format
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
        container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode())
    return path


def add_exif_orientation(jpeg: bytes, orientation: int) -> bytes:
    """The same JPEG with an EXIF orientation tag (1 to 8)."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    segment = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def decode_everything(path: Path) -> np.ndarray:
    """(T,H,W,3) uint8: every frame by the plainest use of PyAV, the reference for exactness."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
