"""The whole way of a clip, from encoded files to answers and reports, on a tiny random checkpoint."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from seats_cli import session as session_module
from seats_cli.errors import DeviceError, MediaError, PlanError, SeatsError, UsageError
from seats_cli.measure.report import Report
from seats_cli.media import VideoDecoding
from seats_cli.session import Answer, AskOptions, ModelOptions, Session, ask
from tiny_checkpoint import TinySpec

QUESTION = "what is said?"
SHORT = AskOptions(max_new_tokens=6, ratio=0.3)


def _write_video(path: Path, seconds: float, *, sound: bool, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 112, 84, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for _ in range(round(seconds * 10)):
            blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(14, 0).repeat(14, 1)
            container.mux(video.encode(av.VideoFrame.from_ndarray(blocks, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            samples = rng.normal(0, 0.1, (1, round(seconds * 16000))).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small file of every kind."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(1)
    soundfile.write(folder / "sound.wav", rng.normal(0, 0.1, 16000 * 5), 16000)
    with av.open(str(folder / "picture.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 120, 90, "rgb24"
        pixels = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return {
        "video with audio": _write_video(folder / "both.mp4", 6.0, sound=True),
        "silent video": _write_video(folder / "silent.mp4", 5.0, sound=False, seed=2),
        "audio": folder / "sound.wav",
        "image": folder / "picture.png",
    }


@pytest.fixture(scope="module")
def session(family_path: Path) -> Session:
    return Session(ModelOptions(model=str(family_path), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def answered(session: Session, files: dict[str, Path]) -> dict[str, Answer]:
    """Every kind of file, asked once with the default method."""
    return {kind: session.ask(path, QUESTION, SHORT) for kind, path in files.items()}


KINDS = ("video with audio", "silent video", "audio", "image")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_answered_and_reported(answered: dict[str, Answer], kind: str) -> None:
    report = answered[kind].report
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert list(document) == [field.name for field in fields(Report)]
    assert document["answer"] == answered[kind].text
    before = report.tokens.before
    assert (before.video > 0) == ("video" in kind)
    assert (before.audio > 0) == (kind in ("video with audio", "audio"))
    said = {"silent video": "audio: none in file", "audio": "video: none in file"}
    assert said.get(kind, "") in document["media"]["audio_used"] + document["media"]["video_used"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_never_dropped_and_the_counts_agree(answered: dict[str, Answer], kind: str) -> None:
    tokens = answered[kind].report.tokens
    assert {layer.text for layer in tokens.per_layer} == {tokens.before.text} == {tokens.end.text}
    assert tokens.per_layer[0] == tokens.after_stage_1
    for drop in tokens.drops:
        assert tokens.per_layer[drop.after_layer] == drop.left
    assert tokens.per_layer[-1] == tokens.end
    totals = [layer.total for layer in tokens.per_layer]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("method", ["seats", "random", "fixed"])
def test_the_retention_reached_is_the_one_planned(
    session: Session, files: dict[str, Path], kind: str, method: str
) -> None:
    report = session.ask(files[kind], QUESTION, replace(SHORT, method=method, max_new_tokens=1)).report
    reached, asked = report.retention.reached, report.retention.asked
    assert asked.overall == 0.3
    assert reached.overall == pytest.approx(report.method["expected_retention"], abs=1e-12)
    assert reached.overall == pytest.approx(0.3, abs=0.02)
    assert (reached.video is None) == (report.tokens.before.video == 0)
    assert (reached.audio is None) == (report.tokens.before.audio == 0)
    assert report.compute.ratio < 0.6


def test_full_keeps_everything_and_equals_ratio_one(session: Session, files: dict[str, Path]) -> None:
    path = files["video with audio"]
    full = session.ask(path, QUESTION, replace(SHORT, method="full", ratio=1.0))
    whole = session.ask(path, QUESTION, replace(SHORT, ratio=1.0))
    assert full.text == whole.text
    for report in (full.report, whole.report):
        assert report.compute.ratio == 1.0
        assert report.retention.reached.overall == 1.0
        assert report.memory.kv_bytes == report.memory.kv_bytes_full
        assert report.tokens.drops == ()


def test_full_writes_what_the_stock_model_writes(session: Session, files: dict[str, Path]) -> None:
    """Greedy tokens against transformers' own generate, over the embeddings and positions that we lay out."""
    seen: dict[str, Any] = {}

    def listening(adapter: Any, method: Any, plan: Any, embeddings: Any, layout: Any, **rest: Any) -> Any:
        seen.update(embeddings=embeddings, layout=layout, deepstack=rest["deepstack"])
        return original(adapter, method, plan, embeddings, layout, **rest)

    original = session_module.prefill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "prefill", listening)
        ours = session.ask(files["video with audio"], QUESTION, AskOptions(method="full", max_new_tokens=8))
    thinker = session.adapter._model  # type: ignore[attr-defined]  # the reference needs the stock module itself
    rows, position = seen["embeddings"][None], seen["layout"].position[:, None]
    ids: list[int] = []
    features: dict[str, Any] = {}
    if seen["deepstack"] is not None:
        features["deepstack_visual_embeds"] = seen["deepstack"][:, seen["layout"].kind == 1]
    with torch.inference_mode():
        while len(ids) < 8:
            if features:
                mask = torch.zeros(1, rows.shape[1], dtype=torch.bool)
                mask[0, : len(seen["layout"])] = seen["layout"].kind == 1
                features["visual_pos_masks"] = mask
            hidden = thinker.model.language_model(
                inputs_embeds=rows, position_ids=position, use_cache=False, **features
            )
            token = int(thinker.lm_head(hidden.last_hidden_state)[0, -1].argmax())
            if token in session.adapter.eos_token_ids:
                break
            ids.append(token)
            rows = torch.cat([rows, session.adapter.embed_text(torch.tensor([token]))[None]], dim=1)
            position = torch.cat([position, position.max() + torch.ones(3, 1, 1, dtype=torch.int64)], dim=2)
    expected = session.adapter.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
    assert ours.text == expected
    assert ours.report.tokens.generated == len(ids)


def test_a_b_a_gives_a(session: Session, files: dict[str, Path], answered: dict[str, Answer]) -> None:
    first = answered["video with audio"]
    session.ask(files["audio"], "the", AskOptions(ratio=0.5, preset="paper", max_new_tokens=3))
    again = session.ask(files["video with audio"], QUESTION, SHORT)
    assert again.text == first.text
    assert again.report.tokens == first.report.tokens


def test_a_report_is_enough_to_run_it_again(session: Session, files: dict[str, Path]) -> None:
    options = AskOptions(
        ratio=0.4, method="random", settings={"merge": "on"}, max_new_tokens=5, temperature=2.0, top_p=0.9,
        seed=7, fps=1.0, start_s=1.0, end_s=5.0,
    )  # fmt: skip
    first = session.ask(files["video with audio"], QUESTION, options)
    stored = json.loads(json.dumps(first.report.to_json()))
    asked = {field.name: stored["options"][field.name] for field in fields(AskOptions)}
    loaded = {field.name: stored["options"][field.name] for field in fields(ModelOptions)}
    again = Session(ModelOptions(**loaded)).ask(
        stored["media"]["path"], stored["question"], AskOptions(**asked)
    )
    assert AskOptions(**asked) == options
    assert again.text == first.text
    assert again.report.tokens == first.report.tokens
    assert stored["media"]["duration_s"] == pytest.approx(4.0, abs=0.2)


def test_seeds_decide_what_is_sampled(session: Session, files: dict[str, Path]) -> None:
    def text(seed: int) -> str:
        options = AskOptions(ratio=0.5, temperature=5.0, seed=seed, max_new_tokens=10)
        return session.ask(files["audio"], QUESTION, options).text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(1, 5)}) > 1


def test_the_seed_also_drives_random_selection(session: Session) -> None:
    assert session.setup(AskOptions(seed=5)).options.seed == 5


def test_no_question_at_all(session: Session, files: dict[str, Path]) -> None:
    """What Qwen3-Omni's Captioner is asked: the sound alone."""
    tokens = session.ask(files["audio"], "", SHORT).report.tokens
    assert tokens.before.audio > tokens.after_stage_1.audio > 0
    assert tokens.generated


def test_both_decode_caches(session: Session, files: dict[str, Path]) -> None:
    reports = {}
    for cache in ("text", "layerwise"):
        options = replace(SHORT, settings={"decode_cache": cache})
        reports[cache] = session.ask(files["video with audio"], QUESTION, options).report
    geometry = session.adapter.geometry
    per_token = 2 * geometry.n_kv_heads * geometry.head_dim * 4
    for cache, report in reports.items():
        assert report.method["options"].decode_cache == cache
        totals = [layer.total for layer in report.tokens.per_layer]
        held = [report.tokens.end.total] * len(totals) if cache == "text" else totals
        assert report.memory.kv_bytes == per_token * sum(held)
        assert report.memory.kv_bytes_full == per_token * report.tokens.before.total * len(totals)


def test_the_published_style_runs(session: Session, files: dict[str, Path]) -> None:
    report = session.ask(files["video with audio"], QUESTION, replace(SHORT, preset="paper")).report
    assert report.method["options"].decode_cache == "text"
    assert report.tokens.end.total == report.tokens.before.text


def test_what_is_told_while_it_runs(tiny_checkpoint_path: Path, files: dict[str, Path]) -> None:
    log: list[str] = []
    notes: list[str] = []
    pieces: list[str] = []
    stages: list[tuple[str, int, int]] = []
    options = ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32")
    session = Session(options, log=log.append, note=notes.append)
    answer = session.ask(
        files["video with audio"],
        QUESTION,
        SHORT,
        on_text=pieces.append,
        on_stage=lambda *step: stages.append(step),
    )
    assert "".join(pieces) == answer.text
    assert any("preset" in line for line in log)
    before = answer.report.tokens.before
    assert any(str(before.video) in line and str(before.audio) in line for line in notes)
    assert list(dict.fromkeys(name for name, _, _ in stages)) == [
        "probe",
        "encode_audio",
        "read",
        "encode_video",
        "prefill",
        "generate",
    ]
    assert ("prefill", 6, 6) in stages


def test_timing_and_memory_are_reported(answered: dict[str, Answer]) -> None:
    timing = answered["video with audio"].report.timing
    assert list(timing.stages) == [
        "probe", "read", "preprocess", "encode_video", "encode_audio", "select", "prefill", "generate",
    ]  # fmt: skip
    assert timing.time_to_first_token_s is not None
    assert 0 < timing.time_to_first_token_s <= timing.total_s
    assert sum(timing.stages.values()) <= timing.total_s
    assert timing.load_s > 0
    memory = answered["video with audio"].report.memory
    assert memory.peak_bytes is not None
    assert 0 < memory.kv_bytes < memory.kv_bytes_full < memory.peak_bytes


def test_an_answer_of_one_token(session: Session, files: dict[str, Path]) -> None:
    report = session.ask(files["audio"], QUESTION, replace(SHORT, max_new_tokens=1)).report
    assert report.tokens.generated <= 1
    assert report.timing.tokens_per_s is None


# ---- what goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"method": "best"}, UsageError, "best"),
        ({"settings": {"colour": "red"}}, UsageError, "colour"),
        ({"preset": "nowhere"}, UsageError, "nowhere"),
        ({"ratio": 1.5}, PlanError, "1.5"),
        ({"ratio": 0.001}, PlanError, "0.001"),
        ({"temperature": -1.0}, UsageError, "temperature"),
        ({"max_new_tokens": 0}, UsageError, "max-new-tokens"),
        ({"fps": 0.0}, UsageError, "fps"),
        ({"start_s": 90.0}, MediaError, "90"),
    ],
)
def test_wrong_options_say_what_is_wrong(
    session: Session, files: dict[str, Path], options: dict[str, Any], kind: type[SeatsError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        session.ask(files["video with audio"], QUESTION, replace(SHORT, **options))


def test_a_prompt_beyond_the_context_names_the_options(
    make_checkpoint: Callable[[TinySpec], Path], files: dict[str, Path]
) -> None:
    small = make_checkpoint(TinySpec(context_length=512))
    session = Session(ModelOptions(model=str(small), device="cpu", dtype="float32"))
    with pytest.raises(PlanError, match="512") as caught:
        session.ask(files["video with audio"], QUESTION, replace(SHORT, method="full"))
    assert "--max-frames" in str(caught.value.hint)
    # What stage I drops needs no room: the same clip fits when pruned.
    assert session.ask(files["video with audio"], QUESTION, replace(SHORT, ratio=0.1)).report.tokens.generated


def test_a_range_with_nothing_in_it_is_an_error(tiny_checkpoint_path: Path, files: dict[str, Path]) -> None:
    session = Session(ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32"))
    with pytest.raises(MediaError, match="nothing to see or hear"):
        session.ask(files["audio"], QUESTION, replace(SHORT, start_s=1.0, end_s=1.01))


def test_settings_that_change_nothing_are_told(tiny_checkpoint_path: Path, files: dict[str, Path]) -> None:
    warnings: list[str] = []
    options = ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32")
    session = Session(options, warn=warnings.append)
    session.ask(files["audio"], QUESTION, replace(SHORT, method="full", settings={"merge": "on"}))
    assert warnings == ["everything is kept, so --set merge has no effect"]
    session.ask(files["audio"], QUESTION, replace(SHORT, settings={"merge": "on"}))
    assert len(warnings) == 1


def test_the_embedded_model_has_random_weights_on_request(files: dict[str, Path]) -> None:
    session = Session(ModelOptions(load_format="dummy", device="cpu"))
    assert session.random_weights
    assert session.ask(files["audio"], QUESTION, SHORT).report.environment.random_weights


def test_a_clip_longer_than_the_positions_known_is_answered_with_a_warning(
    make_checkpoint: Callable[[TinySpec], Path], files: dict[str, Path]
) -> None:
    warnings: list[str] = []
    small = make_checkpoint(TinySpec(context_length=90))
    session = Session(ModelOptions(model=str(small), device="cpu", dtype="float32"), warn=warnings.append)
    session.ask(files["audio"], "what?", replace(SHORT, ratio=0.1, max_new_tokens=1))
    assert any("beyond the 90" in warning for warning in warnings), warnings


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1e15 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_an_error_with_advice_and_the_session_goes_on(
    session: Session, files: dict[str, Path], answered: dict[str, Answer], error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "prefill", fail)
        with pytest.raises(DeviceError, match="out of memory") as caught:
            session.ask(files["audio"], QUESTION, SHORT)
    assert "by estimate --end 0:02" in str(caught.value.hint), "a clip of sound alone, of 5 s"
    assert session.ask(files["audio"], QUESTION, SHORT).text == answered["audio"].text


def test_other_runtime_errors_are_not_called_memory(session: Session, files: dict[str, Path]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "prefill", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            session.ask(files["audio"], QUESTION, SHORT)


def test_the_function_takes_both_kinds_of_options(tiny_checkpoint_path: Path, files: dict[str, Path]) -> None:
    answer = ask(
        files["audio"], QUESTION, model=str(tiny_checkpoint_path), device="cpu", ratio=0.3, max_new_tokens=2
    )
    assert answer.report.options["ratio"] == 0.3
    assert answer.report.environment.model == str(tiny_checkpoint_path)
    with pytest.raises(UsageError, match="'ratoi'"):
        ask(files["audio"], QUESTION, ratoi=0.3)


def test_random_weights_are_said(files: dict[str, Path], tiny_checkpoint_path: Path) -> None:
    session = Session(ModelOptions(model=str(tiny_checkpoint_path), device="cpu", load_format="dummy"))
    assert session.random_weights
    assert not session.is_embedded
    assert session.ask(files["audio"], QUESTION, SHORT).report.environment.random_weights


# --- where video is decoded -------------------------------------------------------------------------------
def test_a_gpu_that_cannot_decode_is_told_once_a_session(
    tiny_checkpoint_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seats_cli.media.nvdec.why_not", lambda gpu: "it is broken")
    warned: list[str] = []
    said: list[str] = []
    options = ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32", hwaccel="cuda")
    session = Session(options, log=said.append, warn=warned.append)
    reports = [session.ask(files["silent video"], QUESTION, SHORT).report for _ in range(2)]
    assert warned == ["--hwaccel cuda: video is decoded on the CPU: it is broken"]
    assert said.count("video decoded on the CPU: it is broken") == 2
    assert [report.media["video_decoder"] for report in reports] == ["cpu", "cpu"]
    assert reports[0].options["hwaccel"] == "cuda"
    sound = session.ask(files["audio"], QUESTION, SHORT).report
    assert sound.media["video_decoder"] == ""


@pytest.mark.parametrize(("hwaccel", "gpu"), [("none", None), ("auto", 1), ("cuda", 1)])
def test_the_models_own_gpu_decodes(monkeypatch: pytest.MonkeyPatch, hwaccel: str, gpu: int | None) -> None:
    model = SimpleNamespace(device=torch.device("cuda", 1), name="a model", parameter_count=1)
    monkeypatch.setattr(session_module, "load_model", lambda *_, **__: model)
    monkeypatch.setattr("seats_cli.media.nvdec.why_not", lambda gpu: None)
    options = ModelOptions(graphs=False, hwaccel=hwaccel)
    assert Session(options, warn=pytest.fail).video_decoding.gpu == gpu


def test_clips_are_decoded_where_the_session_says(
    tiny_checkpoint_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no such GPU, so it does not open, which costs the answer nothing."""
    warned: list[str] = []
    plain = ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32")
    expected = Session(plain).ask(files["silent video"], QUESTION, SHORT)
    monkeypatch.setattr(session_module, "choose_decoding", lambda *_: VideoDecoding(99, insisted=True))
    session = Session(replace(plain, hwaccel="cuda"), warn=warned.append)
    answers = [
        session.ask(media, QUESTION, SHORT)
        for media in (files["silent video"], session.read(files["silent video"], SHORT))
    ]
    assert [answer.text for answer in answers] == [expected.text] * 2
    assert {line.partition(" open")[0] for line in warned} == {
        "silent.mp4: video decoded on the CPU: the GPU's decoder does not"
    }


def test_a_way_to_decode_that_does_not_exist_is_told_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UsageError, match="hwaccel is 'vaapi'"):
        Session(ModelOptions(hwaccel="vaapi"))
