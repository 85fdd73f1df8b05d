"""A model's name becomes a folder of files, and the files become plain values.

Whatever is missing, foreign or broken ends here as a ModelError that says which file and what to do, before
anything heavy is imported or allocated.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from seats_cli.errors import ModelError, UsageError
from seats_cli.model.preprocess import MelSpec, PixelStats

Log = Callable[[str], None]

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")

EMBEDDED = "tiny"  # the name of the model that ships with the package


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint's files are. `repo` is set for one from the hub; weights may come later."""

    name: str
    folder: Path
    repo: str | None = None
    revision: str | None = None
    offline: bool = False

    def read_json(self, file: str) -> dict[str, Any] | None:
        """A JSON file of the checkpoint, None where there is none; ModelError for a broken one."""
        path = self.folder / file
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ModelError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"{path} should hold a JSON object")
        return content


def is_offline(offline: bool) -> bool:
    """Whether the network is forbidden, by argument or by HF_HUB_OFFLINE / TRANSFORMERS_OFFLINE."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return offline or any(os.environ.get(n, "").upper() in {"1", "ON", "YES", "TRUE"} for n in names)


def locate(model: str, *, revision: str | None, offline: bool, log: Log) -> Checkpoint:
    """Find a checkpoint: "tiny" (the embedded one), a folder, or a hub id (small files are fetched)."""
    if model == EMBEDDED:
        folder = Path(str(resources.files("seats_cli") / "demo" / "weights"))
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"the embedded model is missing from this installation ({folder})",
                hint="reinstall seats-cli, or name a checkpoint with --model",
            )
        return Checkpoint(model, folder)
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"--revision {revision} is for the hub, but {model} is a folder")
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{model} is not a checkpoint: it has no config.json",
                hint="give the folder that holds config.json and the .safetensors files",
            )
        return Checkpoint(model, path)
    if path.exists():
        raise ModelError(f"{model} is a file; a checkpoint is a folder", hint=f"try --model {path.parent}")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"no such model: {model}",
            hint="give a folder, or a hub id such as Qwen/Qwen2.5-Omni-7B",
        )
    return _from_hub(model, revision, is_offline(offline), log)


def _from_hub(repo: str, revision: str | None, offline: bool, log: Log) -> Checkpoint:
    log(f"model {repo}: looking in the Hugging Face cache" + ("" if offline else " and on the hub"))
    from huggingface_hub import snapshot_download

    folder = _hub_call(
        repo,
        revision,
        lambda: snapshot_download(
            repo, revision=revision, allow_patterns=list(SMALL_FILES), local_files_only=offline
        ),
        offline,
    )
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{repo} is not a checkpoint that can be loaded: it has no config.json"
            + (" in the local cache" if offline else "")
        )
    return Checkpoint(repo, path, repo=repo, revision=path.name, offline=offline)


def _hub_call(repo: str, revision: str | None, call: Callable[[], Any], offline: bool) -> Any:
    """Run a hub call and tell its failures in words."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: its licence must be accepted on the hub first",
            hint=f"accept it at https://huggingface.co/{repo}, then run `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {repo}, or it is private",
            hint="check the spelling; for a private model run `hf auth login`",
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repo} is neither a folder nor a valid hub id") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if offline:
            raise ModelError(
                f"{repo} is not in the local cache, and the network is off (--offline or HF_HUB_OFFLINE)",
                hint="run once with network access, or give a folder",
            ) from error
        raise ModelError(
            f"{repo} is not in the local cache, and the hub cannot be reached",
            hint="check the network, or give a folder that holds the checkpoint",
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelError(f"fetching {repo} failed: {error}") from error


# ---- weights -------------------------------------------------------------------------------------


def thinker_weights(checkpoint: Checkpoint, log: Log) -> dict[str, Path]:
    """Weight name -> safetensors file, of the thinker alone; its files are all present afterwards.

    A full checkpoint names its thinker's weights `thinker.*`; files that only hold the talker or the vocoder
    are neither fetched nor opened. ModelError for missing shards and for pickled weights.
    """
    index = checkpoint.read_json(INDEX_FILE)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{checkpoint.folder / INDEX_FILE} has no weight_map")
        names = _thinker_names(weight_map)
        files = {name: str(weight_map[name]) for name in names}
        _require(checkpoint, sorted(set(files.values())), log)
        return {name: checkpoint.folder / file for name, file in files.items()}
    single = checkpoint.folder / WEIGHTS_FILE
    if checkpoint.repo is not None or single.is_file():
        _require(checkpoint, [WEIGHTS_FILE], log)
        with open_safetensors(single) as opened:
            return dict.fromkeys(_thinker_names(opened.keys()), single)
    if any(checkpoint.folder.glob("*.bin")) or any(checkpoint.folder.glob("*.pt")):
        raise ModelError(
            f"{checkpoint.name} has pickled weights only, which can run code when loaded",
            hint="convert them to safetensors first",
        )
    raise ModelError(
        f"{checkpoint.name} has no weights: neither {INDEX_FILE} nor {WEIGHTS_FILE}",
        hint="the download may be incomplete; --load-format dummy runs a config with random weights",
    )


def _thinker_names(names: Iterable[str]) -> list[str]:
    every = list(names)
    prefixed = [name for name in every if name.startswith("thinker.")]
    return prefixed or [name for name in every if not name.startswith(("talker.", "token2wav.", "code2wav."))]


def _require(checkpoint: Checkpoint, files: list[str], log: Log) -> None:
    """Fetch the files (hub) or make sure that they are there (folder)."""
    missing = [file for file in files if not (checkpoint.folder / file).is_file()]
    if not missing:
        return
    repo = checkpoint.repo
    if repo is None or checkpoint.offline:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{checkpoint.name} is incomplete: {len(missing)} of {len(files)} weight files are missing"
            f" ({shown})",
            hint="download the checkpoint again" + (" without --offline" if repo else ""),
        )
    from huggingface_hub import hf_hub_download

    for number, file in enumerate(missing, start=1):
        log(f"fetching {file} of {repo} ({number} of {len(missing)})")

        def fetch(file: str = file) -> str:
            return hf_hub_download(repo, file, revision=checkpoint.revision)

        _hub_call(repo, checkpoint.revision, fetch, checkpoint.offline)


def open_safetensors(path: Path) -> Any:
    """An open safetensors file; ModelError for a file that is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file: {error}", hint="download the checkpoint again"
        ) from error


# ---- preprocessing constants ---------------------------------------------------------------------


def read_preprocessor(checkpoint: Checkpoint) -> tuple[PixelStats, MelSpec]:
    """Pixel and mel constants from preprocessor_config.json, or transformers 5's processor_config.json."""
    file = "preprocessor_config.json"
    content = checkpoint.read_json(file)
    if content is None:
        file = "processor_config.json"
        nested = checkpoint.read_json(file)
        if nested is None:
            raise ModelError(
                f"{checkpoint.name} has no preprocessor_config.json, which says how to read pixels and sound",
                hint="copy it from the checkpoint that this one was made from",
            )
        content = {**nested.get("image_processor", {}), **nested.get("feature_extractor", {})}
    size = content.get("size") or {}
    limits = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    content = {**{key: size[name] for key, name in limits.items() if name in size}, **content}

    def get(key: str) -> Any:
        if content.get(key) is None:
            raise ModelError(f"{checkpoint.folder / file} lacks `{key}`")
        return content[key]

    stats = PixelStats(
        mean=_three(get("image_mean"), "image_mean"),
        std=_three(get("image_std"), "image_std"),
        rescale=float(content.get("rescale_factor") or 1 / 255),
        image_min_pixels=int(get("min_pixels")),
        image_max_pixels=int(get("max_pixels")),
    )
    mel = MelSpec(
        bins=int(get("feature_size")),
        sampling_rate=int(get("sampling_rate")),
        n_fft=int(get("n_fft")),
        hop_length=int(get("hop_length")),
    )
    return stats, mel


def _three(values: Any, key: str) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3:
        raise ModelError(f"`{key}` should be three numbers, one a channel, not {values!r}")
    return (float(values[0]), float(values[1]), float(values[2]))


def eos_ids(checkpoint: Checkpoint, configs: Iterable[Mapping[str, Any]]) -> set[int]:
    """Ids that end an answer, as generation_config.json and the configs state them."""
    found: set[int] = set()
    for source in (checkpoint.read_json("generation_config.json") or {}, *configs):
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        found.update(v for v in values if isinstance(v, int))
    return found
