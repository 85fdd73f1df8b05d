"""seats: questions about video and audio, answered locally from the tokens that matter.

Importing this package imports neither torch nor transformers; `Session` and `ask` load on first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "ask"]

if TYPE_CHECKING:
    from seats_cli.session import Session, ask


def __getattr__(name: str) -> Any:
    if name in ("Session", "ask"):
        from seats_cli import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
