"""What a file is, before anything is read in full: its tracks, its clock, and whether it decodes at all."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av

from ..errors import MediaEncrypted, MediaError, MediaFormat, MediaMissing, MediaTruncated
from .container import REFUSED_FORMATS, decode, frame_ticks, open_container, packets, stream_of
from .limits import Guard, Limits

Kind = Literal["video", "audio", "image"]

ACCEPTED = (
    "accepted: video (mp4, mov, mkv, webm, avi, ts), audio (wav, mp3, flac, m4a, ogg), "
    "images (jpg, png, webp, gif)"
)
_IMAGE_FORMATS = {"gif", "apng", "image2", "ico", "jpegxl_anim", "webp_anim"}
_PLAYLISTS = (b"#EXTM3U", b"ffconcat version", b"[playlist]", b"<asx", b"v=0")
# Containers whose header states the length that was recorded; the others' is a guess from the file's size.
_STATED_LENGTH = {"mov", "matroska", "wav", "w64", "flac", "avi", "flv", "asf", "aiff"}
_PROBE_PACKETS = 1000  # how many packets of a track may fail before it counts as undecodable
_PROBE_BYTES = 64 << 20

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Track:
    """One stream that decodes. Seconds on the container's clock; `rotation` in degrees counterclockwise."""

    index: int
    codec: str
    first_s: float
    stated_end_s: float | None
    words: str = ""  # "track 2 of 3 (eng)", empty when it is the only one
    width: int = 0
    height: int = 0
    rotation: int = 0
    average_fps: float = 0.0
    pixel_format: str = ""  # of the decoded frames, FFmpeg's name
    rate: int = 0
    channels: int = 0


@dataclass(frozen=True)
class Probe:
    """A file that holds something to answer from; its time 0 is `origin_s` on the container's clock."""

    path: Path
    size_bytes: int
    container: str
    kind: Kind
    video: Track | None
    audio: Track | None
    origin_s: float
    guard: Guard
    stated_end_s: float | None  # when the header says that the file ends, None where it does not say
    about_s: float | None  # how long the container believes the file to be, a guess in some formats


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path of a regular, readable, non-empty local file; raises `MediaMissing` saying what else it is.

    Opens nothing that could block (a FIFO, a device) and takes no address (http://, rtsp://).
    """
    text = os.fspath(path)
    try:
        status = os.stat(text)
    except (OSError, ValueError) as error:
        if match := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            raise MediaMissing(
                f"{text}: addresses ({match[0]}) are not read, only local files",
                hint="download it first, then pass the file's path",
            ) from None
        if isinstance(error, PermissionError):
            raise MediaMissing(f"{text}: permission denied", hint="check who may read the folder") from None
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not a usable path ({error})"
        raise MediaMissing(f"{text}: {reason}", hint="check the spelling; quote names with spaces") from None
    if stat.S_ISDIR(status.st_mode):
        raise MediaMissing(f"{text}: is a folder, not a file", hint="name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise MediaMissing(
            f"{text}: is not a regular file (a pipe, socket or device)", hint="save it to a file first"
        )
    if status.st_size == 0:
        raise MediaMissing(f"{text}: the file is empty (0 bytes)", hint="copy or download it again")
    if not os.access(text, os.R_OK):
        raise MediaMissing(f"{text}: permission denied", hint="check who may read the file")
    return Path(text)


def probe(
    path: str | os.PathLike[str],
    warn: Warn,
    limits: Limits | None = None,
    beat: Callable[[], None] | None = None,
) -> Probe:
    """What the file holds, with the head of each track decoded; raises the kinds of `MediaError`. `beat` as
    in `Guard`."""
    file = check_path(path)
    guard = Guard(path, limits or Limits(), beat)
    guard.size(file.stat().st_size)
    try:
        container = open_container(file, guard)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _unreadable(file, error) from None
    with container:
        names = set(container.format.name.split(","))
        if names & REFUSED_FORMATS or not (container.streams.video or container.streams.audio):
            if _is_playlist(file):
                raise _playlist(file)
            what = f"it reads as {container.format.name}, without audio or video"
            raise MediaFormat(f"{file}: is not media ({what})", hint=ACCEPTED)
        tracks: dict[str, Track | None] = {}
        reasons: list[tuple[str, str]] = []
        for kind in ("video", "audio"):
            stream = _choose(container, kind)
            track = None if stream is None else _try_track(file, stream, kind, container, reasons, guard)
            tracks[kind] = track
        video, audio = tracks["video"], tracks["audio"]
        if video is None and audio is None:
            raise _undecodable(file, reasons)
        for reason, words in reasons:
            warn(f"{file.name}: {words} ({reason}); answered from the other track")
        kind_of_file: Kind = "audio" if video is None else "video"
        if video is not None and _is_image(container, names, file):
            kind_of_file, audio = "image", None
        origin = video.first_s if video is not None else audio.first_s if audio is not None else 0.0
        short = container.format.name.split(",")[0] if len(names) > 1 else container.format.name
        about = None if container.duration is None else container.duration / av.time_base
        stated = None
        if names & _STATED_LENGTH and about is not None:
            stated = about + (container.start_time or 0) / av.time_base
        size = file.stat().st_size
        return Probe(file, size, short, kind_of_file, video, audio, origin, guard, stated, about)


def _choose(container: Any, kind: str) -> Any:
    """The default or best stream of the kind, never a cover picture; None without one."""
    still = (
        av.stream.Disposition.attached_pic
        | av.stream.Disposition.timed_thumbnails
        | av.stream.Disposition.still_image
    )
    streams = list(getattr(container.streams, kind))
    if kind == "video" and len(container.streams) > 1:
        streams = [s for s in streams if not s.disposition & still]
    best = container.streams.best(kind)
    if best is not None and any(s.index == best.index for s in streams):
        return best
    return streams[0] if streams else None


def _try_track(
    file: Path, stream: Any, kind: str, container: Any, reasons: list[tuple[str, str]], guard: Guard
) -> Track | None:
    """The track if its head decodes; otherwise None, and why is added to `reasons`."""
    if stream.codec_context is None:
        reasons.append(("no decoder", f"the {kind} track's codec is not supported"))
        return None
    if kind == "video":
        guard.picture(stream.codec_context.width, stream.codec_context.height)
    frame, reason = _first_frame(file, stream.index, guard)
    if frame is None:
        reasons.append((reason, f"the {kind} track ({stream.codec_context.name}) does not decode"))
        return None
    streams = getattr(container.streams, kind)
    language = stream.metadata.get("language", "und")
    position = [s.index for s in streams].index(stream.index) + 1
    words = f"track {position} of {len(streams)}" + (f" ({language})" if language != "und" else "")
    common = {
        "index": stream.index,
        "codec": stream.codec_context.codec.canonical_name,
        "first_s": _frame_time(frame, stream),
        "stated_end_s": _stated_end(file, container, stream),
        "words": words if len(streams) > 1 else "",
    }
    if kind == "audio":
        return Track(**common, rate=frame.sample_rate, channels=frame.layout.nb_channels)
    # A raw stream without timestamps counts as 25 fps by default; the guess reads the codec's own header.
    rate = (stream.average_rate if stream.start_time is not None else 0) or stream.guessed_rate or 0
    # Only quarter turns are applied; a phone writes nothing else.
    rotation = 90 * round(frame.rotation / 90) % 360
    return Track(
        **common,
        width=frame.width,
        height=frame.height,
        rotation=rotation,
        average_fps=float(rate),
        pixel_format=frame.format.name,
    )


def _first_frame(file: Path, index: int, guard: Guard) -> tuple[Any, str]:
    """The first frame of a stream that decodes, or None and the reason."""
    size = failed = 0
    with open_container(file, guard, only=index) as container:
        stream = stream_of(container, index)
        stream.codec_context.thread_count = 1  # starting a thread a core takes longer than the frame
        for count, packet in enumerate(packets(container, stream, guard)):
            if packet.has_sidedata("encryption_info") or packet.has_sidedata("encryption_init_info"):
                return None, "encrypted"
            frames = decode(packet, guard)
            if frames:
                return frames[0], ""
            failed += frames is None
            size += packet.size
            if count >= _PROBE_PACKETS or size > _PROBE_BYTES:
                break
    return (
        None,
        "no data" if size == 0 else f"{failed} of its first packets are damaged" if failed else "no frames",
    )


def _frame_time(frame: Any, stream: Any) -> float:
    ticks = frame_ticks(frame)
    base = frame.time_base or stream.time_base
    return 0.0 if ticks is None else float(ticks * base)


def _stated_end(file: Path, container: Any, stream: Any) -> float | None:
    """When the header says that the stream ends, on the container's clock; None where it does not say."""
    if not set(container.format.name.split(",")) & _STATED_LENGTH:
        return None
    if container.format.name == "wav" and (seconds := _wav_seconds(file)) is not None:
        return seconds
    if stream.duration is not None:
        # avi's duration is cut to the file's size, its frame count is what was recorded
        length = max(stream.duration, stream.frames) if container.format.name == "avi" else stream.duration
        return float((length + (stream.start_time or 0)) * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return None if tag is None else int(tag[1]) * 3600.0 + int(tag[2]) * 60.0 + float(tag[3])


def _wav_seconds(file: Path) -> float | None:
    """The length that a wav's header states; FFmpeg and libsndfile both cut theirs to the file's size."""
    with suppress(OSError, struct.error), file.open("rb") as stream:
        stream.seek(12)
        bytes_a_second = 0
        for _ in range(100):
            name, size = struct.unpack("<4sI", stream.read(8))
            if name == b"fmt ":
                bytes_a_second = struct.unpack("<8xI", stream.read(12))[0]
                stream.seek(size - 12 + size % 2, os.SEEK_CUR)
            elif name == b"data":  # 0 and the largest number are what a recorder writes before it knows
                return size / bytes_a_second if 0 < size < 0xFFFFFF00 and bytes_a_second else None
            else:
                stream.seek(size + size % 2, os.SEEK_CUR)
    return None


def _is_image(container: Any, names: set[str], file: Path) -> bool:
    brand = container.metadata.get("major_brand", "") if "mov" in names else ""
    if brand.startswith(("hei", "hev", "mif1")) and len(container.streams.video) > 1:
        raise MediaFormat(
            f"{file}: HEIC pictures made of tiles are not read", hint="convert it to jpg or png first"
        )
    return bool(
        names & _IMAGE_FORMATS
        or any(name.endswith("_pipe") for name in names)
        or brand in {"avif", "heic", "heix", "mif1"}
    )


def _unreadable(file: Path, error: Exception) -> MediaError:
    """The error for a file that no demuxer opens."""
    if isinstance(error, PermissionError) and not os.access(file, os.R_OK):
        return MediaMissing(f"{file}: permission denied", hint="check who may read the file")
    if _is_playlist(file):
        return _playlist(file)
    boxes = _mp4_boxes(file)
    if boxes and "moov" not in boxes:
        return MediaTruncated(
            f"{file}: breaks off before its index (an mp4/mov without 'moov'), so nothing in it decodes",
            hint="copy or download it again; a recording that was cut short needs a repair tool",
        )
    with suppress(OSError), file.open("rb") as stream:
        head = stream.read(16)
        if not any(head):
            return MediaTruncated(
                f"{file}: begins with zeros, like a download that did not finish",
                hint="copy or download it again",
            )
    return MediaFormat(f"{file}: is not media, or is damaged at its head ({_reason(error)})", hint=ACCEPTED)


def _is_playlist(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as stream:
        head = stream.read(4096)
        return head.startswith(_PLAYLISTS) or b"<MPD" in head
    return False


def _playlist(file: Path) -> MediaFormat:
    return MediaFormat(
        f"{file}: is not media but a playlist, which names other files",
        hint=f"name the files themselves; {ACCEPTED}",
    )


def _undecodable(file: Path, reasons: list[tuple[str, str]]) -> MediaError:
    """The error for a file that opens, but of which no track decodes."""
    if any(reason == "encrypted" for reason, _ in reasons):
        return MediaEncrypted(
            f"{file}: is encrypted (DRM), so nothing in it can be decoded", hint="use an unprotected copy"
        )
    if not reasons:
        return MediaFormat(f"{file}: holds no video or audio that plays", hint=ACCEPTED)
    if all(reason == "no data" for reason, _ in reasons):
        return MediaTruncated(
            f"{file}: has a header but no media after it", hint="copy or download the file again"
        )
    words = "; ".join(f"{what} ({reason})" for reason, what in reasons)
    return MediaFormat(
        f"{file}: {words}",
        hint="the file is damaged or protected, or of a codec that PyAV lacks; convert it to mp4 (h264, aac)",
    )


def _mp4_boxes(file: Path) -> list[str]:
    """The names of an mp4's top-level boxes; empty when the file does not begin like one."""
    names: list[str] = []
    size_of_file = file.stat().st_size
    with suppress(OSError), file.open("rb") as stream:
        while stream.tell() + 8 <= size_of_file and len(names) < 1000:
            start = stream.tell()
            size, raw = struct.unpack(">I4s", stream.read(8))
            if size == 1:
                wide = stream.read(8)
                size = struct.unpack(">Q", wide)[0] if len(wide) == 8 else 0
            if not names and raw not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
                return []
            names.append(raw.decode("latin-1"))
            if size < 8:
                break
            stream.seek(start + size)
    return names


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text[0].lower() + text[1:] if text else type(error).__name__
