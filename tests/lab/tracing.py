"""An invented trace, for the tests of what is made of one."""

from collections.abc import Mapping, Sequence
from typing import Any


def document(
    both: Sequence[float] | Mapping[int, float],
    *,
    full: float = 0.9,
    n_layers: int | None = None,
    measure: str = "accuracy",
    **changes: Any,
) -> dict[str, Any]:
    """A trace whose removal of both kinds leaves `both`, from layer 1 on or by layer; that of one, more."""
    values = dict(enumerate(both, 1)) if not isinstance(both, Mapping) else dict(both)
    depth = n_layers or len(values)
    values[depth + 1] = full

    def row(value: float) -> dict[str, Any]:
        low, high = max(0.0, value - 0.05), min(1.0, value + 0.05)
        numbers = {"agreement": value, "log_likelihood": value - 1, "probability": value, "n": 40}
        return {"accuracy": value if measure == "accuracy" else None, **numbers, "low": low, "high": high}

    return {
        "schema_version": 1,
        "command": "seats trace",
        "date": "2026-01-02",
        "environment": {"seats": "0", "dtype": "float32", "device_name": "test CPU"},
        "options": {"preset": None},
        "model": {
            "name": "tiny",
            "model_type": "qwen2_5_omni",
            "layers": depth,
            "hidden_size": 256,
            "preset": "tiny",
        },
        "n_layers": depth,
        "measure": measure,
        "samples": 40,
        "clips": 4,
        "counts": {"video": 1000.0, "audio": 400.0},
        "full": row(full),
        "removal": [
            {"kind": kind, "layer": layer, **row(value + (full - value) * part)}
            for kind, part in (("video", 0.3), ("audio", 0.6), ("both", 0.0))
            for layer, value in values.items()
        ],
        "choice": [],
        "entry": [],
        "attention": [
            {"layer": layer, "video": 0.3, "audio": 0.2, "text": 0.5} for layer in range(1, depth + 1)
        ],
        **changes,
    }
