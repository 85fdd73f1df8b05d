"""The pipeline on one page: load a model once, ask about many files.

path -> media.Clip -> prompt: TokenLayout -> encoders: embeddings + saliency -> stage I
     -> prefill (stages II, III) -> decode -> Report

`Session.read` stops behind the encoders, so that many questions about one clip share what they cost.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from seats_cli.answering import Run, clip_facts, environment_of, media_shape, report_of
from seats_cli.asking import EMBEDDED_MODEL, Answer, AskOptions, ModelOptions, ReadClip
from seats_cli.engine import fit
from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import Generation, answer_log_likelihood
from seats_cli.engine.encode import EncodedMedia, OnStage, encode, encode_all
from seats_cli.engine.fit import clip_counts
from seats_cli.engine.graph import GraphDecoder
from seats_cli.engine.memory import Attempt, explained_memory
from seats_cli.engine.prefill import prefill
from seats_cli.engine.together import Sequence
from seats_cli.errors import MediaRange, UsageError
from seats_cli.measure.clock import Stopwatch, idle_until_done, reset_peak_memory
from seats_cli.measure.report import EnvironmentReport
from seats_cli.media import (
    Limits,
    OpenedClip,
    Opener,
    Sampling,
    check_hwaccel,
    choose_decoding,
    open_clip,
)
from seats_cli.model.adapter import Adapter, MediaShape, Prompt
from seats_cli.model.load import load_model
from seats_cli.presets import Preset, resolve_model
from seats_cli.selection.methods import Method, find_method
from seats_cli.selection.options import Setup, configure
from seats_cli.selection.plan import Plan

CACHE_ROOM = 1024  # decoded tokens that a layer's cache has room for at first, unless fewer are asked for


class Session:
    """A loaded model that answers questions; nothing of one question reaches the next."""

    def __init__(
        self,
        options: ModelOptions | None = None,
        *,
        log: Callable[[str], None] | None = None,
        note: Callable[[str], None] | None = None,
        warn: Callable[[str], None] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Load the model. `limits`: what a file may cost before it is refused; generous by default.

        Each callback gets one line at a time: `log` the reasons for automatic choices, `note` what a person
        should know before a long run (the token counts; to `log` by default), `warn` every fallback and loss.
        """
        self.options = options or ModelOptions()
        check_hwaccel(self.options.hwaccel)
        self._log = log or (lambda _: None)
        self._note = note or self._log
        self._warn = warn or (lambda _: None)
        self._limits = limits or Limits()
        clock = Stopwatch()
        with clock.stage("load"), torch.inference_mode(), explained_memory():
            self.adapter: Adapter = load_model(
                resolve_model(self.options.model),
                device=self.options.device,
                dtype=self.options.dtype,
                load_format=self.options.load_format,
                quantize=self.options.quantize,
                device_map=self.options.device_map,
                revision=self.options.revision,
                offline=self.options.offline,
                fuse=self.options.compile,
                log=self._log,
            )
        self.graph: GraphDecoder | None = None
        if self.options.graphs and self.adapter.decodes_in_graph:
            self.graph = GraphDecoder(self.adapter)
            self._log("decoding: a CUDA graph a token")
        else:
            reason = "a graph needs CUDA and the fast paths" if self.options.graphs else "asked for"
            self._log(f"decoding: layer by layer ({reason})")
        device = self.adapter.device
        self.video_decoding = choose_decoding(
            self.options.hwaccel, device.index if device.type == "cuda" else None
        )
        if self.options.hwaccel == "cuda" and self.video_decoding.gpu is None:
            self._warn(f"--hwaccel cuda: video is decoded on the CPU: {self.video_decoding.reason}")
        self.load_seconds = clock.seconds["load"]
        self._log(
            f"{self.adapter.name}: {self.adapter.parameter_count:,} parameters in {self.load_seconds:.1f} s"
        )

    @property
    def is_embedded(self) -> bool:
        """Whether this is the small model that ships with the package and knows its toy world only."""
        return resolve_model(self.options.model) == EMBEDDED_MODEL

    @property
    def random_weights(self) -> bool:
        """Whether the weights are made up (`load_format="dummy"`), so that answers mean nothing."""
        return self.adapter.random_weights

    def release(self) -> None:
        """Give back memory that is kept for speed from one question to the next: the decode buffers."""
        if self.graph is not None:
            self.graph.release()

    def read(
        self,
        media: str | Path,
        options: AskOptions | None = None,
        *,
        on_stage: OnStage | None = None,
        warn: Callable[[str], None] | None = None,
        opener: Opener = open_clip,
    ) -> ReadClip:
        """Open, decode and encode a file once; `ask` takes the result in the file's place.

        Only what `options` say about the clip and the preset matters here. Holds every embedding in memory.
        May run in a thread of its own while another clip is answered. `warn`: who is told of this file's
        losses, instead of the session's own; `opener`: who opens and decodes it, a `DecoderProcess.open`
        perhaps. Raises as `ask` does.
        """
        options = options or AskOptions()
        # Another clip may be decoding in the graph, so its buffers are not given back from here.
        attempt = Attempt(self.adapter, None)
        with torch.inference_mode(), explained_memory(attempt.advice):
            return self._read(
                media, options, on_stage or (lambda *_: None), warn or self._warn, opener, attempt
            )

    def _read(
        self,
        media: str | Path,
        options: AskOptions,
        told: OnStage,
        warn: Callable[[str], None],
        opener: Opener,
        attempt: Attempt,
    ) -> ReadClip:
        preset, sampling = self.setup(options).preset, options.sampling
        # One figure is told, so no stage is timed on the GPU: a batch's dozen threads would mark hundreds.
        clock = Stopwatch()
        with self._opened(media, sampling, preset, clock, told, warn, opener) as (clip, mtime, shape):
            attempt.at("while encoding")
            for line in (clip.video_used, clip.audio_used):
                self._log(line)
            encoded = encode_all(
                self.adapter, clip, shape, clock=clock, on_stage=told,
                windows={
                    "video": preset.windows.video_grids * max(shape.tokens_per_grid, 1),
                    "audio": preset.windows.audio_tokens,
                },
                saliency_positions=preset.windows.audio_saliency_positions,
            )  # fmt: skip
            self._say_decoder(clip)
        idle_until_done(self.adapter.device)
        return ReadClip(
            media, mtime, clip, shape, encoded, sampling, preset.windows, preset.caps, clock.elapsed
        )

    def ask(
        self,
        media: str | Path | ReadClip,
        question: str,
        options: AskOptions | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        on_stage: OnStage | None = None,
    ) -> Answer:
        """Answer one question about one video, audio or image file, or about one already read.

        `on_text` gets the answer in pieces as it is written; `on_stage(stage, done, total)` the progress.
        Raises UsageError, MediaError, PlanError, or DeviceError when memory runs out; the session can go on
        after each.
        """
        run = self.prefill(media, question, options, on_stage=on_stage)
        return self.generate(run, on_text=on_text, on_stage=on_stage)

    def log_likelihood(
        self,
        media: str | Path | ReadClip,
        question: str,
        answer: str,
        options: AskOptions | None = None,
    ) -> float:
        """How likely a given answer is: the mean over its tokens, its end included, of the natural logarithm
        of each one's probability given those before it. Raises as `ask` does."""
        run = self.prefill(media, question, options)
        with torch.inference_mode(), explained_memory(self._answering(run).advice):
            ids = self.adapter.tokenizer.encode(answer, add_special_tokens=False)
            return answer_log_likelihood(self.adapter, run.read, run.prompt.next_position, ids)

    def prefill(
        self,
        media: str | Path | ReadClip,
        question: str,
        options: AskOptions | None = None,
        *,
        on_stage: OnStage | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> Run:
        """The first half of `ask`: everything up to the first token's logits.

        The second half is `generate`, or whatever else decodes from `Run.read`, many at once perhaps, and has
        `answer` make the result. `warn` as in `read`. Raises as `ask` does.
        """
        options = options or AskOptions()
        options.decoding  # noqa: B018 - impossible values are an error before anything runs
        told, attempt = on_stage or (lambda *_: None), Attempt(self.adapter, self.graph)
        encoded = isinstance(media, ReadClip)  # else this is a thread that runs the encoders
        order = self.adapter.launch_order.first() if encoded else nullcontext()
        with torch.inference_mode(), explained_memory(attempt.advice), order:
            return self._prefill(media, question, options, told, warn or self._warn, attempt)

    def _asked(self, clip: OpenedClip, question: str, options: AskOptions) -> fit.Asked:
        """What was asked, for estimates."""
        method = options.method if isinstance(options.method, Method) else find_method(options.method)
        return fit.Asked(
            clip_facts(clip, options.start_s), question, method, self.setup(options), options.ratio,
            options.max_new_tokens, options.system,
        )  # fmt: skip

    def _answering(self, run: Run) -> Attempt:
        """An attempt that begins behind the prefill."""
        attempt = Attempt(self.adapter, self.graph, cache=run.read.cache)
        attempt.at("while answering")
        attempt.asked = self._asked(run.clip, run.question, run.options)
        return attempt

    def _prefill(
        self,
        media: str | Path | ReadClip,
        question: str,
        options: AskOptions,
        on_stage: OnStage,
        warn: Callable[[str], None],
        attempt: Attempt,
    ) -> Run:
        adapter = self.adapter
        clock = Stopwatch(adapter.device, wait=not adapter.on_one_device)
        reset_peak_memory(adapter.device)
        setup, method = self.setup(options), options.method
        method = method if isinstance(method, Method) else find_method(method)
        with self._source(media, options.sampling, setup.preset, clock, on_stage, warn) as (
            clip,
            mtime,
            shape,
            source,
        ):
            attempt.at("while encoding")
            attempt.asked = self._asked(clip, question, options)
            prompt = adapter.prompt(question, shape, system=options.system)
            plan = method.plan(setup.preset, options.ratio, clip_counts(prompt, shape), setup.options)
            self._check_context(prompt, plan, options.max_new_tokens, warn)
            self._say_plan(clip, prompt, plan, setup, options.settings, warn)
            given = encode(
                adapter, method, plan, source, prompt, shape, clock=clock, on_stage=on_stage,
                saliency_positions=setup.preset.windows.audio_saliency_positions,
            )  # fmt: skip
            self._say_decoder(clip)
        attempt.at("in the prefill")
        with clock.stage("prefill"):
            cache = LayerCache(adapter.n_layers, room=min(options.max_new_tokens, CACHE_ROOM))
            read = prefill(
                adapter, method, plan, given.embeddings, given.layout,
                cache=cache, deepstack=given.deepstack,
                on_layer=lambda done, total: on_stage("prefill", done, total),
            )  # fmt: skip
        path = media.media if isinstance(media, ReadClip) else media
        return Run(path, question, options, clip, mtime, prompt, plan, read, clock, read.cache.bytes())

    def generate(
        self,
        run: Run,
        *,
        on_text: Callable[[str], None] | None = None,
        on_stage: OnStage | None = None,
    ) -> Answer:
        """The second half of `ask`: the answer, token by token. Uses up the run."""
        with torch.inference_mode(), explained_memory(self._answering(run).advice):
            return self._generate(run, on_text, on_stage)

    def _generate(self, run: Run, on_text: Callable[[str], None] | None, on_stage: OnStage | None) -> Answer:
        with run.clock.stage("generate"):
            generation = Generation(
                self.adapter,
                run.read,
                run.prompt.next_position,
                run.options.decoding,
                clock=run.clock,
                graph=self.graph,
            )
            for piece in generation:
                if on_text is not None:
                    on_text(piece)
                if on_stage is not None:
                    on_stage("generate", len(generation.token_ids), run.options.max_new_tokens)
        return self.answer(run, generation)

    def answer(self, run: Run, generation: Generation | Sequence) -> Answer:
        """What a finished generation said, with its report."""
        report = report_of(
            self.adapter, run, generation, self.environment,
            load_seconds=self.load_seconds, model_options=self.options,
        )  # fmt: skip
        return Answer(generation.text, report)

    @cached_property
    def environment(self) -> EnvironmentReport:
        """What this session runs on."""
        return environment_of(self.adapter)

    @contextmanager
    def _source(
        self,
        media: str | Path | ReadClip,
        sampling: Sampling,
        preset: Preset,
        clock: Stopwatch,
        on_stage: OnStage,
        warn: Callable[[str], None],
    ) -> Iterator[tuple[OpenedClip, float, MediaShape, OpenedClip | EncodedMedia]]:
        """What a question is asked about: the clip, its mtime and tokens, and where these come from."""
        if isinstance(media, ReadClip):
            if (sampling, preset.windows, preset.caps) != (media.sampling, media.windows, media.caps):
                raise UsageError(
                    f"{media.media} was read with another sampling or preset than it is asked with",
                    hint="read it again, or ask with the same fps, max_frames, start, end and preset",
                )
            yield media.clip, media.mtime, media.shape, media.encoded
            return
        with self._opened(media, sampling, preset, clock, on_stage, warn) as (clip, mtime, shape):
            yield clip, mtime, shape, clip

    @contextmanager
    def _opened(
        self,
        media: str | Path,
        sampling: Sampling,
        preset: Preset,
        clock: Stopwatch,
        on_stage: OnStage,
        warn: Callable[[str], None],
        opener: Opener = open_clip,
    ) -> Iterator[tuple[OpenedClip, float, MediaShape]]:
        on_stage("probe", 0, 0)
        with clock.stage("probe"):
            clip = opener(media, sampling, warn=warn, decoding=self.video_decoding, limits=self._limits)
            mtime = Path(media).stat().st_mtime
        with clip:
            shape = media_shape(self.adapter, clip, preset)
            if not (shape.n_video or shape.n_audio or shape.n_image):
                raise MediaRange(
                    f"{media}: nothing to see or hear: no picture, and less than 0.03 s of sound",
                    hint="ask about a longer range, or check the file with a player",
                )
            yield clip, mtime, shape

    def setup(self, options: AskOptions) -> Setup:
        """The preset and options of selection that a call would run with."""
        geometry = self.adapter.geometry
        return configure(
            options.preset,
            options.settings,
            model_type=geometry.family,
            n_layers=geometry.n_layers,
            hidden_size=geometry.hidden,
            seed=options.seed,
        )

    def _check_context(
        self, prompt: Prompt, plan: Plan, max_new_tokens: int, warn: Callable[[str], None]
    ) -> None:
        """PlanError where the tokens do not fit; a warning where only the clip's time is too long."""
        first = next((stage for stage in plan.stages if not stage.after_layer), None)
        entering = prompt.layout.n_text + first.n_video + first.n_audio if first else len(prompt)
        self.adapter.check_context(prompt, entering, max_new_tokens=max_new_tokens)
        last, limit = prompt.next_position + max_new_tokens, self.adapter.context_length
        if last > limit:
            warn(
                f"the clip reaches position {last:.0f}, beyond the {limit} that this model was made for: "
                "expect worse answers about its end; --start/--end choose a part"
            )

    def _say_plan(
        self,
        clip: OpenedClip,
        prompt: Prompt,
        plan: Plan,
        setup: Setup,
        settings: Mapping[str, str],
        warn: Callable[[str], None],
    ) -> None:
        """What will be read and kept, before anything expensive runs."""
        for line in (clip.video_used, clip.audio_used, *setup.notes, *plan.notes):
            self._log(line)
        if plan.keeps_all and settings:
            warn(f"everything is kept, so --set {', '.join(settings)} has no effect")
        layout, n_image = prompt.layout, prompt.image_slots.numel()
        stage_1 = plan.stages[0] if plan.stages else None
        entering = f", of which {stage_1.n_video} and {stage_1.n_audio} enter the model" if stage_1 else ""
        image = f"{n_image} of an image, never pruned; " if n_image else ""
        self._note(
            f"{layout.n_video} video and {layout.n_audio} audio tokens{entering}; {image}"
            f"{layout.n_text - n_image} of text; expected retention {plan.expected_retention:.3f}"
        )

    def _say_decoder(self, clip: OpenedClip) -> None:
        if clip.decoder_used:
            self._log(clip.decoder_used)


def ask(media: str | Path, question: str, **options: Any) -> Answer:
    """Load a model and answer one question: keywords are the fields of `ModelOptions` and `AskOptions`.

    To ask more than once, keep a `Session`. Raises UsageError for an unknown keyword.
    """
    for_model = {item.name for item in fields(ModelOptions)}
    for_asking = {item.name for item in fields(AskOptions)}
    unknown = sorted(set(options) - for_model - for_asking)
    if unknown:
        known = ", ".join(sorted(for_model | for_asking))
        raise UsageError(f"unknown option {unknown[0]!r}", hint=f"accepted: {known}")
    session = Session(ModelOptions(**{k: v for k, v in options.items() if k in for_model}))
    return session.ask(media, question, AskOptions(**{k: v for k, v in options.items() if k in for_asking}))
