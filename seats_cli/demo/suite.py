"""How often the whole pipeline answers right on clips of the toy world: encoded mp4 in, text out.

`python -m seats_cli.demo.suite --clips 40 --ratios 1.0 0.25 0.10 --json FILE`. Clips are rendered, encoded as
H.264 + AAC, and asked about through `Session.ask`, as `seats ask` does: one question of each family a clip.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seats_cli.demo.questions import FAMILIES
from seats_cli.demo.write import write_clip
from seats_cli.session import AskOptions, ModelOptions, Session

MAX_ANSWER_TOKENS = 24  # the longest answer of the world is a transcript of ten words


def normalised(text: str) -> str:
    """Lower case, single spaces, no punctuation at the end: what an exact match compares."""
    return " ".join(text.lower().split()).rstrip(" .?!")


def one_of_each(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first question of every family, which is an open one."""
    return [next(q for q in questions if q["family"] == family) for family in FAMILIES]


def interval(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    if not asked:
        return 0.0, 1.0
    share, z2 = right / asked, z * z / asked
    middle = (share + z2 / 2) / (1 + z2)
    half = z * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked)) / (1 + z2)
    return max(0.0, middle - half), 1.0 if right == asked else min(1.0, middle + half)


def summarise(samples: list[dict[str, Any]], ratios: Sequence[float]) -> list[dict[str, Any]]:
    """A row a ratio: accuracy by family, their mean, the share right with its interval, retention reached."""
    rows = []
    for ratio in ratios:
        mine = [s for s in samples if s["ratio"] == ratio]
        by_family = {f: [s["right"] for s in mine if s["family"] == f] for f in FAMILIES}
        accuracy = {f: sum(found) / len(found) for f, found in by_family.items() if found}
        right = sum(s["right"] for s in mine)
        low, high = interval(right, len(mine))
        rows.append(
            {
                "ratio": ratio,
                "n": len(mine),
                "accuracy": sum(accuracy.values()) / len(accuracy),
                "low": low,
                "high": high,
                "families": accuracy,
                "retention": sum(s["retention"] for s in mine) / len(mine),
                "seconds": sum(s["seconds"] for s in mine) / len(mine),
            }
        )
    return rows


def as_lines(document: dict[str, Any]) -> str:
    """The document as JSON, a line a row and a line a sample: small, and readable in a diff."""
    parts = []
    for name, value in document.items():
        lists = isinstance(value, list)
        text = ",\n".join(map(json.dumps, value)) if lists else json.dumps(value)
        parts.append(f"{json.dumps(name)}: " + (f"[\n{text}\n]" if lists else text))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def run(
    session: Session, clips: int, seed: int, split: str, seconds: float, ratios: Sequence[float], method: str
) -> list[dict[str, Any]]:
    """Ask about `clips` clips of the split, seeds from `seed` on; one record a question and ratio."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for number in range(seed, seed + clips):
            document = write_clip(path, number, seconds, split)
            for question in one_of_each(document["questions"]):
                for ratio in ratios:
                    options = AskOptions(
                        ratio=ratio,
                        method="full" if ratio == 1.0 else method,
                        max_new_tokens=MAX_ANSWER_TOKENS,
                    )
                    begin = time.perf_counter()
                    answer = session.ask(path, question["question"], options)
                    samples.append(
                        {
                            "seed": number,
                            "ratio": ratio,
                            "family": question["family"],
                            "question": question["question"],
                            "expected": question["answer"],
                            "answer": answer.text,
                            "right": normalised(answer.text) == normalised(question["answer"]),
                            "retention": round(answer.report.retention.reached.overall or 0.0, 5),
                            "seconds": round(time.perf_counter() - begin, 3),
                        }
                    )
            print(f"{number - seed + 1}/{clips} clips", file=sys.stderr, flush=True)
    return samples


def main(arguments: list[str] | None = None) -> int:
    """Command line of the suite; prints a table, and the raw records as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m seats_cli.demo.suite", description=__doc__)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1000, help="first clip's seed")
    parser.add_argument("--split", default="test", choices=("dev", "test", "ood"))
    parser.add_argument("--seconds", type=float, default=16.0, help="length of a clip")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 0.25, 0.1], help="1.0 = all tokens")
    parser.add_argument("--method", default="seats")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and every record here")
    asked = parser.parse_args(arguments)
    session = Session(ModelOptions(model=asked.model), warn=lambda message: print(message, file=sys.stderr))
    samples = run(session, asked.clips, asked.seed, asked.split, asked.seconds, asked.ratios, asked.method)
    rows = summarise(samples, asked.ratios)
    print("ratio  " + "".join(f"{name:>15}" for name in (*FAMILIES, "mean")))
    for row in rows:
        shares = [row["families"][family] for family in FAMILIES]
        print(f"{row['ratio']:<7g}" + "".join(f"{share:>15.1%}" for share in (*shares, row["accuracy"])))
    if asked.json:
        command = "python -m seats_cli.demo.suite " + " ".join(
            arguments if arguments is not None else sys.argv[1:]
        )
        document = {"schema_version": 1, "command": command, "environment": asdict(session.environment())}
        asked.json.write_text(as_lines(document | {"rows": rows, "samples": samples}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
