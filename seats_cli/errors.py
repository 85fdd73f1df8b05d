"""Every error that a user can meet: what is wrong, the value met, what is accepted, what to do.

Each kind knows its exit code (0 all right, 1 some item failed, 2 usage, 130 interrupted) and a stable
`kind` string, which records in JSON output carry.
"""

import errno


class SeatsError(Exception):
    """Base of all errors shown without a traceback. `hint` is the next step, on a line of its own."""

    exit_code = 1
    kind = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SeatsError):
    """The command line or an option's value is wrong."""

    exit_code = 2
    kind = "usage"


class MediaError(SeatsError):
    """A file cannot be read as the media it should be; the item fails, a batch goes on."""

    kind = "media"


class MediaMissing(MediaError):
    """There is no regular, readable, non-empty local file at the path."""

    kind = "media_missing"


class MediaFormat(MediaError):
    """The file is not audio, video or an image, or no decoder here reads it."""

    kind = "media_format"


class MediaEncrypted(MediaError):
    """The file is protected (DRM, common encryption) and nothing in it is clear."""

    kind = "media_encrypted"


class MediaTruncated(MediaError):
    """The file breaks off before anything in it can be decoded."""

    kind = "media_truncated"


class MediaRange(MediaError):
    """The asked range holds nothing of the file, or too little to answer from."""

    kind = "media_range"


class MediaLimit(MediaError):
    """The file is larger, longer or slower to decode than it may be (`--limits`)."""

    kind = "media_limit"


class ModelError(SeatsError):
    """A checkpoint is missing, incomplete, or of a family that is not supported."""

    exit_code = 2
    kind = "model"


class DeviceError(SeatsError):
    """The device cannot run what was asked: absent, or out of memory."""

    kind = "device"


class PlanError(SeatsError):
    """No plan meets the asked budget; the message names the number to change."""

    exit_code = 2
    kind = "plan"


def unexpected(error: BaseException) -> SeatsError:
    """An error that nobody foresaw, in the form of those that are shown; the traceback stays reachable."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = SeatsError(f"cannot write: {error.strerror}", hint="free some space, or write elsewhere")
        full.__cause__ = error
        return full
    words = f"{type(error).__name__}: {error}".rstrip(": ")
    wrapped = SeatsError(f"unexpected {words}", hint="this is a bug in seats; --debug shows where")
    wrapped.__cause__ = error
    return wrapped
