"""Family x input kind: how far logits lie from transformers' own, on tiny random checkpoints in float32.

    python tests/conformance_matrix.py

prints the table of docs/architecture.md. `parts`: transformers' modules as the engine calls them one by one;
`fast`: the packed products and batched windows. The largest logit of each comparison is beside its error.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

from omni_inputs import CLIPS, compare_logits
from seats_cli.model.families import FAMILIES
from seats_cli.model.load import load_model
from tiny_checkpoint import TinySpec, build_tiny_checkpoint


def main() -> None:
    """Build, compare, print."""
    found: dict[str, list[str]] = {name: [] for name in CLIPS}
    heads = []
    for family in FAMILIES:
        heads += [f"{family.title}, {path}" for path in ("parts", "fast")]
        with tempfile.TemporaryDirectory() as folder:
            model = build_tiny_checkpoint(Path(folder), TinySpec(family=family.model_type))
            for fuse in (False, True):
                adapter = load_model(str(model), device="cpu", dtype="float32", fuse=fuse)
                for name in CLIPS:
                    ours, stock, _ = compare_logits(adapter, name)
                    error, size = (float(x.abs().max()) for x in (ours - stock, stock))
                    found[name].append(f"{error:.1e} of {size:.1f}")
    print("| input | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name, cells in found.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
