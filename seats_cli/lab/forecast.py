"""`seats plan`: what an answer would come to, from a config and a clip's counts, without a weight.

The same code that lays out prompts, plans the selection and counts compute says what there would be; memory
is estimated (`measure.memory`) and compared with the devices that are here, or with one that is named.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from seats_cli.answering import clip_facts
from seats_cli.asking import AskOptions, ModelOptions
from seats_cli.engine.fit import (
    Asked,
    ClipFacts,
    Forecast,
    Remedy,
    forecast,
    media_shape,
    remedies,
    within_context,
)
from seats_cli.engine.graph import ROUNDING
from seats_cli.errors import PlanError, UsageError
from seats_cli.lab.bench_input import NATIVE, SAMPLE_RATE
from seats_cli.measure.compute import (
    audio_flops,
    kv_bytes,
    layer_counts,
    layer_flops,
    prefill_flops,
    vision_flops,
)
from seats_cli.measure.memory import HEADROOM, Engine
from seats_cli.measure.report import SCHEMA_VERSION, jsonable, method_record
from seats_cli.media import Sampling, open_clip
from seats_cli.model.adapter import Adapter
from seats_cli.model.dummy import load_outline
from seats_cli.model.footprint import WeightBytes, weight_bytes
from seats_cli.model.placement import check_device_map, choose_dtype, host_memory_free, parse_device
from seats_cli.model.quantize import NONE, refuse_expert_tensors, scheme_of
from seats_cli.presets import resolve_model
from seats_cli.selection.methods import find_method
from seats_cli.selection.options import configure

TRIED_SCHEMES = ("8bit", "4bit")


@dataclass(frozen=True)
class Place:
    """Where a model could run. kind: cuda, mps or cpu; total, free: bytes, None where unknown."""

    name: str
    kind: str
    total: int | None
    free: int | None

    @property
    def room(self) -> int | None:
        """Bytes for tensors: on a GPU less what CUDA and the allocator take themselves."""
        if self.free is None:
            return None
        return max(0, self.free - HEADROOM) if self.kind == "cuda" else self.free


@dataclass(frozen=True)
class PlanRequest:
    """What is planned.

    source:   a file, or the facts of a clip that there is not yet
    shorter:  then, those of one with so many seconds, all else as it was typed
    """

    source: str | ClipFacts
    question: str
    asked: AskOptions
    shorter: Callable[[float], ClipFacts] | None = None


def places_here(device: str, place_bytes: int | None) -> list[Place]:
    """The devices that are planned for: one of `place_bytes`, or the named one, or all GPUs, or the host.

    Raises DeviceError and UsageError as loading would."""
    if place_bytes is not None:
        return [Place("a device as asked", "cuda", place_bytes, place_bytes)]
    named = parse_device(device)
    kind = named.type if named is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if named is None and kind == "cpu" and torch.backends.mps.is_available():
        kind = "mps"
    if kind == "cuda":
        indices = range(torch.cuda.device_count()) if named is None else [named.index or 0]
        found = []
        for index in indices:
            free, total = torch.cuda.mem_get_info(index)
            found.append(Place(f"cuda:{index} {torch.cuda.get_device_name(index)}", "cuda", total, free))
        return found
    return [Place("the host's memory" if kind == "cpu" else "Apple's GPU", kind, None, host_memory_free())]


class Planner:
    """A model's outline and the devices here, for any number of clips."""

    def __init__(
        self, model: ModelOptions, *, place_bytes: int | None = None, log: Any = lambda _: None
    ) -> None:
        """Reads configs and no weights. Raises ModelError, DeviceError, UsageError as loading would."""
        scheme_of(model.quantize)
        self.options, self._log = model, log
        self.places = places_here(model.device, place_bytes)
        kind = self.places[0].kind
        if place_bytes is None:
            check_device_map(model.device, model.device_map)
        self.adapter: Adapter = load_outline(
            resolve_model(model.model),
            dtype=model.dtype,
            revision=model.revision,
            offline=model.offline,
            log=log,
        )
        self.dtype = choose_dtype(model.dtype, torch.device(kind), self.adapter.parameter_count, "BF16", log)
        self.stored = self.adapter.quantization
        if self.stored is not None and model.quantize != NONE:
            raise UsageError(f"{model.model} is quantised already ({self.stored}): leave --quantize out")
        if model.quantize != NONE:
            refuse_expert_tensors(model.quantize, self.adapter.network)
        self.weights = self.weights_under(model.quantize)
        self._kind = kind

    def weights_under(self, quantize: str) -> WeightBytes:
        """Bytes of the weights; those of a checkpoint that is quantised in 4 bits as of `4bit`, in 8 as of
        `8bit`, since its own scales are of that order."""
        if self.stored is not None:
            quantize = "4bit" if "4" in self.stored.split()[-1] else "8bit"
        return weight_bytes(self.adapter.network, self.dtype, quantize)

    def engine(self, quantize: str, device_map: str) -> Engine:
        """How the network would run, so far as that decides memory."""
        geometry, model = self.adapter.geometry, self.options
        quantised = self.stored is not None or quantize != NONE
        on_gpu = self._kind == "cuda"
        fast = model.compile and not quantised and device_map == NONE
        return Engine(
            itemsize=self.dtype.itemsize,
            fused=model.compile and device_map == NONE,
            fused_text=fast,
            graph_rounds=ROUNDING if on_gpu and fast and model.graphs else 0,
            dequantised=geometry.hidden * geometry.mlp * self.dtype.itemsize if quantised else 0,
            on_gpu=on_gpu,
        )

    @property
    def device_bytes(self) -> int:
        """All memory of the first device; 0 for the host, as `engine.fit` takes it."""
        return (self.places[0].total or 0) if self._kind == "cuda" else 0

    def asked(self, clip: ClipFacts, question: str, options: AskOptions) -> Asked:
        """The question, with the method and preset that it would be asked with."""
        geometry, method = self.adapter.geometry, options.method
        setup = configure(
            options.preset,
            options.settings,
            model_type=geometry.family,
            n_layers=geometry.n_layers,
            hidden_size=geometry.hidden,
            seed=options.seed,
        )
        for line in setup.notes:
            self._log(line)
        chosen = find_method(method) if isinstance(method, str) else method
        return Asked(clip, question, chosen, setup, options.ratio, options.max_new_tokens, options.system)

    def forecast(self, asked: Asked, quantize: str | None = None, device_map: str | None = None) -> Forecast:
        """What it comes to, under another quantisation or device map than was asked for."""
        quantize, device_map = quantize or self.options.quantize, device_map or self.options.device_map
        weights, engine = self.weights_under(quantize).total, self.engine(quantize, device_map)
        return forecast(self.adapter, asked, weights, engine, device_bytes=self.device_bytes)

    # ---- what fits -----------------------------------------------------------------------------------------

    @property
    def rooms(self) -> list[int]:
        """Bytes for tensors on each device that tells."""
        return [place.room for place in self.places if place.room is not None]

    def fits(self, found: Forecast, device_map: str | None = None) -> bool | None:
        """Whether some device has room; with a device map, whether the GPUs have room for what runs there and
        together with the host for the weights. None where no device tells."""
        if not self.rooms:
            return None
        if (device_map or self.options.device_map) == NONE:
            return found.memory.peak <= max(self.rooms)
        left = [room - found.memory.working for room in self.rooms]
        plain = self.stored is None and self.options.quantize == NONE  # others cannot wait on the host
        host = (host_memory_free() or 0) if plain else 0
        return min(left) > 0 and found.memory.weights <= sum(left) + host

    def remedies(
        self, asked: Asked, found: Forecast, shorter: Callable[[float], ClipFacts] | None = None
    ) -> list[Remedy]:
        """What would make a forecast fit: options of the question first, then of loading. `shorter`: see
        `PlanRequest`."""
        room = max(self.rooms, default=math.inf)
        quantize, device_map = self.options.quantize, self.options.device_map
        tried = remedies(
            self.adapter,
            asked,
            self.weights.total,
            self.engine(quantize, device_map),
            device_bytes=self.device_bytes,
            room=room,
            shorter=shorter,
        )
        if not within_context(self.adapter, asked, found):
            return tried
        for scheme in TRIED_SCHEMES if quantize == NONE and self.stored is None else ():
            try:
                refuse_expert_tensors(scheme, self.adapter.network)
            except UsageError:
                break
            then = self.forecast(asked, scheme)
            if then.memory.peak <= room:
                tried.append(Remedy(f"--quantize {scheme}", then))
                break
        if device_map == NONE and self._kind == "cuda":
            then = self.forecast(asked, device_map="auto")
            if self.fits(then, "auto"):
                tried.append(Remedy("--device-map auto", then))
        return tried


# ---- the document -----------------------------------------------------------------------------------------


def clip_to_come(
    seconds: float, frames: int | None, size: tuple[int, int] | None, fps: float, max_frames: int
) -> ClipFacts:
    """A clip of so many seconds, with sound. frames: None samples it as a file would be, 0 has no picture;
    size: (width, height) in pixels, 1280x720 by default."""
    width, height = size or NATIVE
    n_frames = (
        max(2, min(round(seconds * fps), max_frames) // 2 * 2) if frames is None else frames + frames % 2
    )
    return ClipFacts(
        n_frames=n_frames,
        height=height if n_frames else 0,
        width=width if n_frames else 0,
        sample_fps=n_frames / seconds,
        n_samples=round(seconds * SAMPLE_RATE),
    )


def read_facts(path: str, asked: AskOptions, warn: Any) -> tuple[ClipFacts, dict[str, Any]]:
    """What of a file would be looked at, and its record. Raises MediaError."""
    sampling: Sampling = asked.sampling
    with open_clip(path, sampling, warn=warn) as clip:
        facts = clip_facts(clip, asked.start_s)
        record = {
            **asdict(clip.info),
            "path": path,
            "frames": len(clip.frame_times_s),
            "sample_fps": clip.sample_fps,
            "samples": clip.n_samples,
        }
    return facts, record


def document(planner: Planner, request: PlanRequest, warn: Any = lambda _: None) -> dict[str, Any]:
    """What --json prints: plain values. Raises PlanError, MediaError, UsageError as asking would."""
    if isinstance(request.source, ClipFacts):
        facts, media = request.source, {**asdict(request.source), "path": None}
    else:
        facts, media = read_facts(request.source, request.asked, warn)
    asked = planner.asked(facts, request.question, request.asked)
    shape = media_shape(planner.adapter, facts, asked.setup.preset)
    if not (shape.n_video or shape.n_audio or shape.n_image):
        raise PlanError("nothing to see or hear: no picture, and less than 0.03 s of sound")
    found = planner.forecast(asked)
    in_memory, in_context = planner.fits(found), within_context(planner.adapter, asked, found)
    fits = in_memory if in_context else False
    unfit = planner.remedies(asked, found, request.shorter) if fits is False else []
    plain: dict[str, Any] = jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "media": media,
            "question": request.question,
            "model": _model_record(planner),
            "method": method_record(found.plan),
            "tokens": _token_record(found),
            "compute": _compute_record(planner.adapter, found),
            "memory": {**_memory_record(planner, found), "fits": in_memory},
            "context": {
                "length": planner.adapter.context_length,
                "needed": found.entering + asked.new_tokens,
                "fits": in_context,
            },
            "devices": [{**asdict(place), "fits": _fits_on(place, found)} for place in planner.places],
            "fits": fits,
            "remedies": [
                {"option": remedy.option, "peak_bytes": remedy.forecast.memory.peak} for remedy in unfit
            ],
            "options": {
                **asdict(planner.options),
                **asdict(replace(request.asked, method=found.plan.method)),
            },
        }
    )
    return plain


def _fits_on(place: Place, found: Forecast) -> bool | None:
    return None if place.room is None else found.memory.peak <= place.room


def _model_record(planner: Planner) -> dict[str, Any]:
    adapter, weights = planner.adapter, planner.weights
    return {
        "name": planner.options.model,
        "family": adapter.geometry.family,
        "parameters": adapter.parameter_count,
        "layers": adapter.n_layers,
        "dtype": str(planner.dtype).removeprefix("torch."),
        "quantization": planner.stored
        or (None if planner.options.quantize == NONE else planner.options.quantize),
        "weight_bytes": {**asdict(weights), "total": weights.total},
    }


def _token_record(found: Forecast) -> dict[str, Any]:
    counts = found.counts
    layers = layer_counts(found.plan.stages, found.plan.n_layers, (counts.n_video, counts.n_audio))

    def record(video: int, audio: int) -> dict[str, int]:
        return {"text": counts.n_text, "video": video, "audio": audio, "total": counts.n_text + video + audio}

    before = counts.n_video + counts.n_audio
    seen = sum(video + audio for video, audio in layers)
    return {
        "before": record(counts.n_video, counts.n_audio),
        "image": found.shape.n_image,
        "grid": found.shape.video_grid or found.shape.image_grid,
        "per_layer": [record(*layer) for layer in layers],
        "retention": seen / (before * len(layers)) if before else None,
    }


def _compute_record(adapter: Adapter, found: Forecast) -> dict[str, Any]:
    geometry, grid = adapter.geometry, found.shape.video_grid or found.shape.image_grid
    full = [sum((found.counts.n_text, found.counts.n_video, found.counts.n_audio))] * adapter.n_layers
    kept, everything = prefill_flops(found.lengths, geometry), prefill_flops(full, geometry)
    return {
        "full_flops": everything,
        "kept_flops": kept,
        "ratio": kept / everything,
        "per_layer": [layer_flops(length, geometry) for length in found.lengths],
        "vision_flops": vision_flops(grid, geometry) if grid is not None else 0,
        "audio_flops": audio_flops(found.shape.audio_frames, geometry),
    }


def _memory_record(planner: Planner, found: Forecast) -> dict[str, Any]:
    memory, counts = found.memory, found.counts
    full = [counts.n_text + counts.n_video + counts.n_audio] * planner.adapter.n_layers
    return {
        "weights_bytes": memory.weights,
        "workspace_bytes": memory.workspace,
        **{f"{name}_bytes": n for name, n in memory.moments.items()},
        "largest": memory.largest,
        "peak_bytes": memory.peak,
        "kv_bytes": memory.kv,
        "kv_bytes_full": kv_bytes(full, planner.adapter.geometry, planner.dtype.itemsize),
        "buffer_bytes": memory.buffers,
        "headroom_bytes": HEADROOM if planner.places[0].kind == "cuda" else 0,
    }
