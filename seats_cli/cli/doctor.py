"""`seats doctor`: what is installed, what this machine has, and what is missing for what."""

import importlib
import json
import os
import platform
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from seats_cli import __version__
from seats_cli.cli.config import default_path
from seats_cli.cli.console import Table, Terminal
from seats_cli.cli.tables import human_bytes

# Options of loading that need more, the packages, and the extra that brings them.
EXTRAS = (
    ("--device-map", ("accelerate",), "multi-gpu"),
    ("--quantize 8bit, 4bit", ("accelerate", "bitsandbytes"), "bitsandbytes"),
    ("--quantize int8, int4, fp8", ("accelerate", "torchao"), "torchao"),
)
# Imported one by one, since a package can be installed and still not load (a missing system library).
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "av": "av",
    "librosa": "librosa",
    "soundfile": "soundfile",
    "soxr": "soxr",
    "numpy": "numpy",
    "pyyaml": "yaml",
    "rich": "rich",
    "typer": "typer",
}
DECODERS = {
    "H.264": ("h264",),
    "HEVC": ("hevc",),
    "VP9": ("vp9", "libvpx-vp9"),
    "AV1": ("libdav1d", "av1", "libaom-av1"),
    "AAC": ("aac",),
    "Opus": ("opus", "libopus"),
}
ENCODERS = {"H.264": ("libx264", "libopenh264"), "AAC": ("aac",)}
OMNI_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker")
FREE_DISK = 1 << 30  # below this a download or a rendered clip is likely to fail


@dataclass(frozen=True)
class Finding:
    """One line. `state`: ok, missing (something will not work), untested, or broken (nothing will)."""

    topic: str
    name: str
    state: str
    value: str


def doctor(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show versions, devices, memory, codecs and models, and what is missing for what.

    Exit code: 0 if questions can be answered, 1 if something essential is broken.
    """
    terminal: Terminal = ctx.obj
    terminal.debug = debug
    findings = examine()
    if as_json:
        terminal.document({"schema_version": 1, "findings": [asdict(f) for f in findings]})
    else:
        for topic in dict.fromkeys(f.topic for f in findings):
            rows = tuple((f.name, f.state, f.value) for f in findings if f.topic == topic)
            terminal.report(Table(topic, ("", "", ""), rows, numbers=False))
    if any(f.state == "broken" for f in findings):
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Everything that is looked at, in the order in which it is shown."""
    packages = list(examine_packages())
    broken = {f.name for f in packages if f.state == "broken"}
    findings = [*examine_python(), *packages]
    findings += examine_devices() if "torch" not in broken else []
    findings += [*examine_memory(), *examine_disk()]
    findings += examine_codecs() if "av" not in broken else []
    findings += examine_models()
    return [*findings, *conclusions(findings)]


def examine_python() -> Iterator[Finding]:
    """Python, the platform, seats itself and its config file."""
    version = platform.python_version()
    yield Finding("versions", "seats", "ok", __version__)
    yield Finding("versions", "python", "ok" if sys.version_info >= (3, 11) else "broken", version)
    yield Finding("versions", "platform", "ok", platform.platform())
    config = default_path()
    yield Finding("versions", "config file", "ok", str(config) if config.is_file() else f"none at {config}")


def examine_packages() -> Iterator[Finding]:
    """Each package that seats needs: that it loads, its version, whether that is in the tested range."""
    from importlib import metadata

    ranges = required_ranges()
    for package, module in PACKAGES.items():
        try:
            importlib.import_module(module)
            version = metadata.version(package)
        except Exception as error:  # a broken package can fail with anything
            yield Finding("versions", package, "broken", f"does not load: {error}")
            continue
        wanted = ranges.get(package)
        if wanted is not None and not wanted.contains(version, prereleases=True):
            yield Finding("versions", package, "untested", f"{version}, tested with {wanted}")
        else:
            yield Finding("versions", package, "ok", version)


def required_ranges() -> dict[str, Any]:
    """The version ranges that seats states for its packages; empty where it runs from a bare source tree."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        stated = metadata.requires("seats-cli") or []
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in stated]
    return {r.name.lower(): r.specifier for r in requirements if r.marker is None}


def examine_devices() -> Iterator[Finding]:
    """The accelerators that torch can use, or why there is none."""
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        value = f"{torch.cuda.get_device_name(index)}, {human_bytes(free)} free of {human_bytes(total)}"
        yield Finding("devices", f"cuda:{index}", "ok", f"{value}, compute capability {major}.{minor}")
    if torch.cuda.device_count() == 0:
        yield Finding("devices", "cuda", "missing", why_no_cuda(torch.version.cuda))
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "ok", "Apple GPU")
    yield Finding(
        "devices", "cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    )


def why_no_cuda(torch_cuda: str | None) -> str:
    """The likeliest reason why torch sees no CUDA device."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "hidden by CUDA_VISIBLE_DEVICES"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver on this machine"
    if torch_cuda is None:
        return "there is an NVIDIA driver, but this torch is built for CPUs: install torch with CUDA"
    return f"there is an NVIDIA driver, but torch (CUDA {torch_cuda}) cannot use it: it may be too old"


def examine_memory() -> Iterator[Finding]:
    """Memory of the machine, where the platform tells."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return
    value = human_bytes(total)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        value = f"{human_bytes(int(fields['MemAvailable'].split()[0]) * 1024)} free of {value}"
    yield Finding("memory", "ram", "ok", value)


def examine_disk() -> Iterator[Finding]:
    """Room where checkpoints are kept and where we are."""
    for name, folder in (("model cache", hub_cache()), ("this folder", Path.cwd())):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(existing).free
        state = "ok" if free >= FREE_DISK else "missing"
        yield Finding("memory", f"disk, {name}", state, f"{human_bytes(free)} free at {folder}")


def examine_codecs() -> Iterator[Finding]:
    """The decoders that PyAV carries, the GPU's, and the encoders with which `seats demo` writes."""
    import av.codec

    from seats_cli.media.nvdec import CODECS, why_not

    for mode, table in (("r", DECODERS), ("w", ENCODERS)):
        for name, codecs in table.items():
            found = next((c for c in codecs if has_codec(av.codec.Codec, c, mode)), None)
            essential = mode == "r" and name in ("H.264", "AAC")
            state = "ok" if found else "broken" if essential else "missing"
            verb = "decode" if mode == "r" else "encode"
            yield Finding("codecs", f"{verb} {name}", state, found or f"PyAV has none of {', '.join(codecs)}")
    problem = why_not(0)
    value = problem or f"--hwaccel cuda: {', '.join(CODECS)}"
    yield Finding("codecs", "decode on GPU 0", "missing" if problem else "ok", value)


def has_codec(codec: Any, name: str, mode: str) -> bool:
    """Whether FFmpeg, as PyAV carries it, was built with a codec."""
    try:
        codec(name, mode)
    except ValueError:  # PyAV's UnknownCodecError is one
        return False
    return True


# --- models -----------------------------------------------------------------------------------------------
def hub_cache() -> Path:
    """Where the Hugging Face hub keeps checkpoints, by its own variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def examine_models() -> Iterator[Finding]:
    """The embedded model, and the Qwen-Omni checkpoints in the hub's cache."""
    embedded = Path(__file__).parents[1] / "demo" / "weights"
    problem = incomplete(embedded)
    state = "broken" if problem else "ok"
    yield Finding("models", "tiny (embedded)", state, problem or human_bytes(thinker_bytes(embedded)))
    cache = hub_cache()
    found = 0
    for snapshot in sorted(cache.glob("models--*/snapshots/*")):
        if model_type(snapshot) not in OMNI_TYPES:
            continue
        found += 1
        name = snapshot.parents[1].name.removeprefix("models--").replace("--", "/")
        problem = incomplete(snapshot)
        value = problem or f"{human_bytes(thinker_bytes(snapshot))} to load, revision {snapshot.name[:12]}"
        yield Finding("models", name, "missing" if problem else "ok", value)
    if found == 0:
        yield Finding("models", "Qwen-Omni", "missing", f"no checkpoint in {cache}")


def model_type(folder: Path) -> str | None:
    """What config.json says the checkpoint is; None if it does not."""
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value.get("model_type") if isinstance(value, dict) else None


def weight_files(folder: Path) -> list[str]:
    """The safetensors files that the checkpoint consists of, whether they are there or not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return ["model.safetensors"]


def incomplete(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be loaded; None if it has its config, tokenizer and weights."""
    try:
        wanted = ["config.json", "tokenizer_config.json", *weight_files(folder)]
    except (OSError, ValueError, KeyError) as error:
        return f"its list of weights cannot be read: {error}"
    absent = [name for name in wanted if not (folder / name).exists()]
    return f"{len(absent)} files missing in {folder}: {', '.join(absent[:3])}" if absent else None


def thinker_bytes(folder: Path) -> int:
    """Bytes of the weights that are loaded: a full checkpoint's thinker, or all of a thinker-only one."""
    total = thinker = 0
    for name in weight_files(folder):
        for tensor, size in tensor_sizes(folder / name):
            total += size
            thinker += size if tensor.startswith("thinker.") else 0
    return thinker or total


def tensor_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Name and bytes of each tensor in a safetensors file, from its header alone."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, end - begin


# --- what follows -----------------------------------------------------------------------------------------
def conclusions(findings: Sequence[Finding]) -> Iterator[Finding]:
    """What can be done on this machine, and what each missing thing is needed for."""
    topic = "what works"
    broken = [f.name for f in findings if f.state == "broken"]
    real = any(f.topic == "models" and f.state == "ok" and "embedded" not in f.name for f in findings)
    gpu = any(f.topic == "devices" and f.state == "ok" and f.name != "cpu" for f in findings)
    if broken:
        yield Finding(topic, "seats ask", "broken", f"needs {', '.join(broken)}")
    else:
        yield Finding(topic, "seats ask, embedded model", "ok", 'seats ask docs/clip.mp4 "what is said?"')
    if not real:
        value = "give --model a folder, or download: hf download Qwen/Qwen2.5-Omni-3B"
    elif not gpu:
        value = "works on the CPU, in minutes a clip: no GPU was found"
    else:
        value = "see models and devices above"
    yield Finding(topic, "seats ask, Qwen-Omni", "ok" if real and gpu else "missing", value)
    writers = [f.name for f in findings if f.name.startswith("encode ") and f.state != "ok"]
    yield Finding(
        topic, "seats demo", "missing" if writers else "ok", ", ".join(writers) or "can write clips"
    )
    for option, packages, extra in EXTRAS:
        absent = [package for package in packages if find_spec(package) is None]
        value = f'pip install "seats-cli[{extra}]"' if absent else f"{' and '.join(packages)} installed"
        yield Finding(topic, option, "missing" if absent else "ok", value)
    outdated = [f.name for f in findings if f.state == "untested"]
    if outdated:
        yield Finding(topic, "versions", "untested", f"outside what was tested: {', '.join(outdated)}")
