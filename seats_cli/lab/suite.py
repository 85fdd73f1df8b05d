"""The built-in suite: clips of the toy world with their questions and true answers, rendered when needed.

A clip is fixed by its split, seed and length. Clips of different splits never meet, and dev, test and ood use
voices and sounds that the embedded model never heard in training (docs/demo-model.md).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from seats_cli.lab.manifest import Sample

SPLITS = ("dev", "test", "ood")
SUITE_VERSION = 1  # raised when the same seed gives another clip or other questions


@dataclass(frozen=True)
class SuiteClip:
    """One clip of the suite, by what it is drawn from."""

    split: str
    seed: int
    seconds: float

    @property
    def name(self) -> str:
        """ "test-16-0": split, seconds, seed."""
        return f"{self.split}-{self.seconds:g}-{self.seed}"


def suite_clips(
    n: int, seed: int = 0, split: str = "test", seconds: float = 16.0
) -> list[tuple[SuiteClip, tuple[Sample, ...]]]:
    """`n` clips, of seeds `seed`, `seed` + 1, ..., each with all its questions; nothing is rendered yet.

    A sample's `media` is the name of a file that is there only while `rendered` holds it. Raises UsageError
    for a length that no clip can have.
    """
    return [_with_questions(SuiteClip(split, number, seconds)) for number in range(seed, seed + n)]


def _with_questions(clip: SuiteClip) -> tuple[SuiteClip, tuple[Sample, ...]]:
    from seats_cli.demo.world import sample_clip, suite_questions

    questions = suite_questions(sample_clip(clip.seed, clip.seconds, clip.split))
    samples = tuple(
        Sample(
            id=f"{clip.name}-{index}",
            media=Path(f"{clip.name}.mp4"),
            question=asked.question,
            answers=(asked.answer,),
            options=asked.options or (),
            family=asked.family,
            clip=clip.name,
        )
        for index, asked in enumerate(questions)
    )
    return clip, samples


@contextmanager
def rendered(clip: SuiteClip, folder: Path | None = None) -> Iterator[Path]:
    """The clip as an mp4 file (H.264 and AAC) inside `folder`, gone after the block. Takes some seconds.

    Raises MediaError where it cannot be written.
    """
    from seats_cli.demo.write import write_clip

    with tempfile.TemporaryDirectory(prefix="seats-clip-", dir=folder) as place:
        path = Path(place) / f"{clip.name}.mp4"
        write_clip(path, clip.seed, clip.seconds, clip.split)
        yield path
