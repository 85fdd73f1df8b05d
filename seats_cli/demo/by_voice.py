"""Which voices the embedded model understands: `python -m seats_cli.demo.by_voice --split ood --clips 160`.

Teacher-forced on rendered tensors, as the trainer measures, but counted by the voice that speaks. A CPU does.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from seats_cli.demo.batches import IGNORED, Size
from seats_cli.demo.nouns import SPLITS
from seats_cli.demo.questions import FAMILIES
from seats_cli.demo.trainer import Trainer
from seats_cli.demo.voices import voices
from seats_cli.demo.world import ClipSpec, sample_clip

_TRANSCRIPTION = FAMILIES.index("transcription")
Tally = dict[str, dict[str, list[int]]]  # voice -> what -> [right, asked]


def by_voice(trainer: Trainer, split: str, size: Size, clips: int) -> dict[str, Any]:
    """{"words": {voice: {right, asked}}, "families": {voice: {family: share}}} of a split's first clips.

    A word counts for its own voice; a question for the clip's voice, or for "several" where two speak.
    """
    words: Tally = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    families: Tally = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    layers = trainer.config["geometry"]["text"]["num_hidden_layers"]
    dropped = torch.zeros(layers, size.clips, dtype=torch.bool, device=trainer.device)
    for index, (_, batch) in enumerate(trainer.batches((size,), split, 0, -(-clips // size.clips))):
        with torch.no_grad():
            out = trainer.run(batch, size.seconds, dropped, augment=False)
        for j in range(size.clips):
            seed = trainer.config["seed"] * 100_000_000 + index * size.clips + j
            clip = sample_clip(seed, size.seconds, split)
            rows = {name: batch[name][j] for name in ("targets", "doc", "family")}
            _count(clip, rows, out.right[j], out.top[j], trainer.token_id, (words, families))
    return {
        "words": {voice: {"right": n["all"][0], "asked": n["all"][1]} for voice, n in sorted(words.items())},
        "families": {
            voice: {name: round(n[name][0] / n[name][1], 4) for name in FAMILIES if name in n}
            for voice, n in sorted(families.items())
        },
    }


def _count(
    clip: ClipSpec,
    rows: dict[str, Tensor],
    right: Tensor,
    top: Tensor,
    token_id: dict[str, int],
    tallies: tuple[Tally, Tally],
) -> None:
    names = {token_id[word.word]: voices()[word.voice].name for word in clip.words}
    speaker = names[token_id[clip.words[0].word]] if len(set(names.values())) == 1 else "several"
    for block, family in enumerate(rows["family"].tolist()):
        if not 0 <= family < len(FAMILIES):
            continue
        tally = tallies[1][speaker][FAMILIES[family]]
        tally[0] += int(right[block])
        tally[1] += 1
        if family == _TRANSCRIPTION:
            asked = (rows["doc"] == block) & (rows["targets"] != IGNORED)
            for target, found in zip(rows["targets"][asked].tolist(), top[asked].tolist(), strict=True):
                if target in names:
                    word = tallies[0][names[target]]["all"]
                    word[0] += int(target == found)
                    word[1] += 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: JSON on stdout."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(prog="python -m seats_cli.demo.by_voice", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=here / "weights")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=16.0)
    chosen = parser.parse_args(arguments)
    config = yaml.safe_load((here / "train.yaml").read_text()) | {"workers": 0}
    trainer = Trainer(config, torch.device("cpu"), None)
    trainer.start_from(chosen.checkpoint)
    result = by_voice(trainer, chosen.split, trainer.size(chosen.seconds, 4), chosen.clips)
    head = {"split": chosen.split, "clip_seconds": chosen.seconds, "clips": -(-chosen.clips // 4) * 4}
    sys.stdout.write(json.dumps(head | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
