"""The word bank: every word of the toy world in every voice, as one small Ogg Opus file and its index.

`voices/bank.ogg` is the words one after the other, voice by voice, 16 kHz mono; `voices/index.json` names the
voices, their split, and the length of each word. The bank was made by `python -m seats_cli.demo.voices build`
with espeak-ng (training, dev and test voices) and flite (the out-of-distribution voices); running the model
or rendering a clip needs neither. `export PATH.npz` writes the decoded bank as 8-bit mu-law for machines that
cannot decode Opus; `load_bank(path=...)` reads it back.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seats_cli.demo.nouns import MAX_WORD_S, SAMPLE_RATE, SPLITS
from seats_cli.errors import MediaError, UsageError

FOLDER = Path(__file__).parent / "voices"
INDEX = "index.json"
AUDIO = "bank.ogg"
GAP = 160  # samples of silence between two words of the file: the codec would smear one into the next


@dataclass(frozen=True)
class Voice:
    """One speaker. `start`, `lengths` (n_words,): where its words stand in the decoded file, in samples."""

    name: str
    split: str
    start: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class WordBank:
    """Words as waveforms of `SAMPLE_RATE`.

    samples: (n_voices, n_words, max_len) float32, zero after each word's end; lengths: (n_voices, n_words)
    int64; names: voice names; splits: the split of each voice. Voices stand in the order of the index, so
    that the voice numbers of a ClipSpec index the whole bank; a bank of the training voices alone is a prefix
    of it.
    """

    samples: torch.Tensor
    lengths: torch.Tensor
    names: tuple[str, ...]
    splits: tuple[str, ...]

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> "WordBank":
        """The same bank with its samples on `device` as `dtype`."""
        return WordBank(self.samples.to(device, dtype), self.lengths.to(device), self.names, self.splits)


@lru_cache(maxsize=1)
def voices() -> tuple[Voice, ...]:
    """All voices of the shipped bank, training ones first. Reads only the index."""
    try:
        index = json.loads((FOLDER / INDEX).read_text())
    except FileNotFoundError as error:
        raise MediaError(
            f"the word bank's index is missing: {FOLDER / INDEX}",
            hint="reinstall seats-cli, or build it with: python -m seats_cli.demo.voices build",
        ) from error
    found = []
    start = 0
    for row in index["voices"]:
        lengths = tuple(row["lengths"])
        found.append(Voice(row["name"], row["split"], start, lengths))
        start += sum(lengths) + GAP * len(lengths)
    return tuple(found)


@lru_cache(maxsize=8)
def voice_numbers(split: str) -> tuple[int, ...]:
    """Numbers of the voices that clips of `split` may use."""
    if split not in SPLITS:
        raise UsageError(f"no such split: {split!r}", hint="choose one of " + ", ".join(SPLITS))
    return tuple(i for i, voice in enumerate(voices()) if voice.split == split)


def load_bank(
    device: str | torch.device = "cpu", split: str = "all", *, path: str | Path | None = None
) -> WordBank:
    """The word bank on `device`.

    split: "train" for the training voices alone, "all" for every voice (rendering dev, test or ood clips
    needs these). path: an .npz written by `export`; by default the shipped Opus file is decoded (about 1 s).
    """
    if split not in ("train", "all"):
        raise UsageError(f"a bank is 'train' or 'all', not {split!r}")
    flat, chosen = _read_export(Path(path)) if path is not None else (_decode_shipped(), voices())
    if split == "train":
        chosen = tuple(voice for voice in chosen if voice.split == "train")
    longest = max(max(voice.lengths) for voice in chosen)
    samples = np.zeros((len(chosen), len(chosen[0].lengths), longest), np.float32)
    for i, voice in enumerate(chosen):
        at = voice.start
        for j, length in enumerate(voice.lengths):
            samples[i, j, :length] = flat[at : at + length]
            at += length + GAP
    return WordBank(
        torch.from_numpy(samples),
        torch.tensor([voice.lengths for voice in chosen], dtype=torch.int64),
        tuple(voice.name for voice in chosen),
        tuple(voice.split for voice in chosen),
    ).to(device)


def _decode_shipped() -> np.ndarray[Any, np.dtype[np.float32]]:
    import soundfile  # heavy for callers that bring an .npz

    samples, rate = soundfile.read(FOLDER / AUDIO, dtype="float32")
    if rate != SAMPLE_RATE:
        raise MediaError(f"{FOLDER / AUDIO} has a sample rate of {rate} Hz, not {SAMPLE_RATE}")
    flat: np.ndarray[Any, np.dtype[np.float32]] = samples
    return flat


def mu_law_encode(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Waveform in [-1, 1] to 8-bit mu-law (mu = 255, ITU-T G.711's curve without its segments)."""
    curve = np.sign(samples) * np.log1p(255.0 * np.abs(samples)) / np.log(256.0)
    return np.rint((np.clip(curve, -1, 1) + 1) * 127.5).astype(np.uint8)


def mu_law_decode(codes: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Inverse of mu_law_encode, float32. Code 128 is exact silence and 127 its neighbour."""
    curve = codes.astype(np.float32) / 127.5 - 1
    curve[codes == 128] = 0.0
    wave = np.sign(curve) * np.expm1(np.abs(curve) * np.log(256.0)) / 255.0
    return wave.astype(np.float32)


def export(path: str | Path) -> int:
    """Write the decoded bank to `path` (.npz, 8-bit mu-law, needs NumPy alone to read). Returns its bytes."""
    path = Path(path)
    names = [voice.name for voice in voices()]
    np.savez_compressed(
        path,
        codes=mu_law_encode(_decode_shipped()),
        lengths=np.array([voice.lengths for voice in voices()], np.int32),
        names=np.array(names),
        splits=np.array([voice.split for voice in voices()]),
    )
    return path.stat().st_size


def _read_export(path: Path) -> tuple[np.ndarray[Any, np.dtype[np.float32]], tuple[Voice, ...]]:
    with np.load(path) as file:
        flat = mu_law_decode(file["codes"])
        lengths, names, splits = file["lengths"], file["names"], file["splits"]
    starts = np.concatenate([[0], np.cumsum(lengths.sum(1) + GAP * lengths.shape[1])])
    rows = zip(names.tolist(), splits.tolist(), starts.tolist(), lengths.tolist(), strict=False)
    return flat, tuple(Voice(name, split, start, tuple(row)) for name, split, start, row in rows)


def main(arguments: list[str] | None = None) -> int:
    """`python -m seats_cli.demo.voices build | export PATH.npz`."""
    parser = argparse.ArgumentParser(prog="python -m seats_cli.demo.voices", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="synthesise the bank with espeak-ng and flite")
    build.add_argument("--folder", type=Path, default=FOLDER)
    commands.add_parser("export", help="write the decoded bank as .npz").add_argument("path", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        from seats_cli.demo.build_voices import build_bank

        size = build_bank(chosen.folder)
    else:
        size = export(chosen.path)
    sys.stderr.write(f"{size} bytes; longest word {MAX_WORD_S} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
