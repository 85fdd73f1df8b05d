"""Fixtures that every room's tests may use."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that `import tiny_checkpoint` works from any room

if TYPE_CHECKING:
    from seats_cli.model.adapter import Adapter
    from tiny_checkpoint import TinySpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Where the golden data lies: SEATS_GOLDEN, or tests/golden."""
    return Path(os.environ.get("SEATS_GOLDEN") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[TinySpec], Path]":
    """`make_checkpoint(TinySpec(...))`: the folder of such a checkpoint, built once a session."""
    from tiny_checkpoint import TinySpec, build_tiny_checkpoint

    built: dict[TinySpec, Path] = {}

    def make(spec: TinySpec = TinySpec()) -> Path:  # noqa: B008 - a frozen value
        if spec not in built:
            built[spec] = build_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", spec)
        return built[spec]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint_path(make_checkpoint: "Callable[..., Path]") -> Path:
    """A full checkpoint (thinker, talker, token2wav), sharded, float32. Read it only."""
    return make_checkpoint()


@pytest.fixture(scope="session", params=["qwen2_5_omni", "qwen3_omni_moe"])
def family_path(request: pytest.FixtureRequest, make_checkpoint: "Callable[..., Path]") -> "Path":
    """A full checkpoint of each family in turn, sharded, float32. Read it only."""
    from tiny_checkpoint import TinySpec

    return make_checkpoint(TinySpec(family=request.param))


@pytest.fixture(scope="session")
def family_adapter(family_path: "Path") -> "Adapter":
    """The checkpoint of `family_path`, loaded on the CPU in float32. Frozen: share it freely."""
    from seats_cli.model.load import load_model

    return load_model(str(family_path), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def qwen3_path(make_checkpoint: "Callable[..., Path]") -> "Path":
    """As `tiny_checkpoint_path`, of Qwen3-Omni. Read it only."""
    from tiny_checkpoint import QWEN3

    return make_checkpoint(QWEN3)


@pytest.fixture(scope="session")
def qwen3_adapter(qwen3_path: "Path") -> "Adapter":
    """Qwen3-Omni alone, as `tiny_adapter` is Qwen2.5-Omni."""
    from seats_cli.model.load import load_model

    return load_model(str(qwen3_path), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_adapter(tiny_checkpoint_path: Path) -> "Adapter":
    """The checkpoint of `tiny_checkpoint_path`, loaded on the CPU in float32. Frozen: share it freely."""
    from seats_cli.model.load import load_model

    return load_model(str(tiny_checkpoint_path), device="cpu", dtype="float32")
