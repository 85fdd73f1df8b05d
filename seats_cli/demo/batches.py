"""Training batches: clips of the world with as many questions as fit, packed into static shapes.

Batch i depends on (seed, i) alone, whatever the number of workers, so a run can be repeated.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from seats_cli.demo import render, world
from seats_cli.demo.questions import FAMILIES, Question, sample_questions
from seats_cli.demo.tokenizer import encode

IGNORED = -100


@dataclass(frozen=True)
class Size:
    """The static shape of a batch: seconds a clip, clips, and Q tokens a clip for questions."""

    seconds: float
    clips: int
    question_tokens: int


@dataclass(frozen=True)
class PackingSpec:
    """What a worker needs to know: `batches` batches from number `first_batch` on; sizes take turns."""

    sizes: tuple[Size, ...]
    questions: int
    split: str
    seed: int
    first_batch: int
    batches: int

    def size(self, index: int) -> Size:
        """The shape of batch `index`."""
        return self.sizes[index % len(self.sizes)]


def pack_questions(
    questions: list[Question], length: int, suffix: list[int], end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Questions of one clip as blocks of one row of `length` tokens.

    Returns ids, targets (IGNORED where nothing is asked), offset (position within the block), doc (block
    number; padding has its own), family (per block, -1 where there is none; 64 blocks at most).
    """
    ids = np.full(length, end, np.int64)
    targets = np.full(length, IGNORED, np.int64)
    offset = np.zeros(length, np.int64)
    doc = np.full(length, 63, np.int64)
    family = np.full(64, -1, np.int64)
    start = 0
    for number, question in enumerate(questions[:63]):
        asked = encode(question.question) + suffix
        answer = [*encode(question.answer), end]
        stop = start + len(asked) + len(answer) - 1  # the last answer token (the end) is only a target
        if stop > length:
            break
        row = asked + answer
        ids[start:stop] = row[:-1]
        targets[stop - len(answer) : stop] = answer
        offset[start:stop] = np.arange(stop - start)
        doc[start:stop] = number
        family[number] = FAMILIES.index(question.family) if question.family in FAMILIES else len(FAMILIES)
        start = stop
    return ids, targets, offset, doc, family


class ClipBatches(IterableDataset[dict[str, torch.Tensor]]):
    """Batches as dicts of tensors: the world's packed specs plus the packed questions."""

    def __init__(self, spec: PackingSpec, suffix: list[int], end: int) -> None:
        self.spec, self.suffix, self.end = spec, suffix, end

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Batch `index`, from its own seeds."""
        spec = self.spec
        size = spec.size(index)
        specs, rows = [], []
        for j in range(size.clips):
            seed = spec.seed * 100_000_000 + index * size.clips + j
            clip = world.sample_clip(seed, size.seconds, spec.split)
            rng = random.Random(f"questions:{spec.split}:{seed}")
            shares = {} if spec.split == "train" else {"dense": 0.0}
            asked = sample_questions(clip, rng, spec.questions, **shares)
            rows.append(pack_questions(asked, size.question_tokens, self.suffix, self.end))
            specs.append(clip)
        packed = {
            name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in render.pack(specs).items()
        }
        names = ("ids", "targets", "offset", "doc", "family")
        columns = zip(names, zip(*rows, strict=True), strict=True)
        return packed | {name: torch.from_numpy(np.stack(column)) for name, column in columns}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            torch.set_num_threads(1)  # a process each
        for index in range(first, self.spec.batches, stride):
            yield self.batch(self.spec.first_batch + index)


def batches(
    spec: PackingSpec, suffix: list[int], end: int, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a spec in order, made by `workers` processes (0: by this one)."""
    loader = DataLoader(
        ClipBatches(spec, suffix, end),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
