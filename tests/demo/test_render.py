"""The renderer shows and plays what the spec says: checked on pixels and samples, not by its labels."""

import dataclasses
import itertools

import pytest
import torch

from seats_cli.demo import render
from seats_cli.demo.nouns import COLOUR_RGB, COLOURS, GLYPHS, SHAPES, SOUNDS, WORDS
from seats_cli.demo.render import labels, pack, render_audio, render_frames, to_tensors
from seats_cli.demo.voices import WordBank
from seats_cli.demo.world import ClipSpec, Maxima, sample_clip
from seats_cli.errors import UsageError

SIZE = 112


@pytest.fixture(scope="module")
def bank() -> WordBank:
    """A fast stand-in: word w of voice v is a tone, as long as in the real bank."""
    from seats_cli.demo.voices import voices

    lengths = torch.tensor([voice.lengths for voice in voices()])
    longest = int(lengths.max())
    t = torch.arange(longest) / 16000
    tones = 0.1 * torch.sin(2 * torch.pi * (200 + 40 * torch.arange(len(WORDS)))[:, None] * t)
    samples = tones * (torch.arange(longest) < lengths.unsqueeze(-1))
    names = tuple(voice.name for voice in voices())
    return WordBank(samples, lengths, names, tuple(voice.split for voice in voices()))


def frames_of(spec: ClipSpec, times: list[float], size: int = SIZE) -> torch.Tensor:
    return render_frames(to_tensors(pack([spec])), torch.tensor([times]), size)[0]


def plain(spec: ClipSpec) -> ClipSpec:
    """The clip without texture and glyphs, on black."""
    scenes = []
    for scene in spec.scenes:
        backdrop = dataclasses.replace(
            scene.backdrop, rgb=(0, 0, 0), gradient=(0, 0), stripe_depth=0, blob_depth=0, grain=0
        )
        scenes.append(dataclasses.replace(scene, backdrop=backdrop, glyph=None))
    return dataclasses.replace(spec, scenes=tuple(scenes))


def centre(frame: torch.Tensor) -> tuple[float, float]:
    """Centre of brightness, in sides of the frame."""
    light = frame.sum(0)
    axis = (torch.arange(frame.shape[-1]) + 0.5) / frame.shape[-1]
    return float((light.sum(0) * axis).sum() / light.sum()), float((light.sum(1) * axis).sum() / light.sum())


def test_frames_have_range_and_are_the_same_in_parts() -> None:
    specs = [sample_clip(seed) for seed in range(3)]
    packed = to_tensors(pack(specs))
    times = torch.arange(0, 16, 2.0).expand(3, -1)
    whole = render_frames(packed, times, SIZE)
    assert whole.shape == (3, 8, 3, SIZE, SIZE)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    for i, spec in enumerate(specs):
        assert torch.allclose(frames_of(spec, times[i, 3:5].tolist()), whole[i, 3:5], atol=1e-5)


def test_a_scene_shows_its_colour_at_the_place_of_its_shape() -> None:
    for seed in range(20):
        spec = sample_clip(seed)
        for scene in spec.scenes:
            if scene.shape in ("ring", "moon"):
                continue  # nothing in the middle
            time = scene.start_s + 0.5
            x, y = scene.x + 0.5 * scene.vx, scene.y + 0.5 * scene.vy
            pixel = frames_of(plain(spec), [time])[0, :, int(y * SIZE), int(x * SIZE)]
            nearest = min(
                COLOURS, key=lambda c: float((pixel - torch.tensor(COLOUR_RGB[COLOURS.index(c)])).norm())
            )
            assert nearest == scene.colour


def test_shapes_go_where_their_motion_says() -> None:
    for seed in range(12):
        spec = plain(sample_clip(seed))
        for scene in spec.scenes:
            before, after = frames_of(spec, [scene.start_s, scene.start_s + 1.5])
            (x0, y0), (x1, y1) = centre(before), centre(after)
            moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0, "still": 0.0}[
                scene.motion
            ]
            if scene.motion == "still":
                assert torch.equal(before, after)
            else:
                assert moved > 0.15


def test_two_frames_half_a_second_apart_differ_unless_still() -> None:
    for seed in range(12):
        spec = sample_clip(seed)
        for scene in spec.scenes:
            a, b = frames_of(spec, [scene.start_s + 0.5, scene.start_s + 1.0])
            assert torch.equal(a, b) == (scene.motion == "still")


def test_the_picture_does_not_depend_on_the_resolution() -> None:
    spec = plain(sample_clip(4))
    small, large = frames_of(spec, [1.0], 112)[0], frames_of(spec, [1.0], 448)[0]
    shrunk = torch.nn.functional.avg_pool2d(large[None], 4)[0]
    assert float((small - shrunk).abs().mean()) < 0.003


def _silhouettes(kind: str) -> list[torch.Tensor]:
    """Every shape or glyph drawn alone at the same place."""
    spec = plain(sample_clip(1))
    scene = dataclasses.replace(
        spec.scenes[0], x=0.5, y=0.5, vx=0.0, vy=0.0, radius=0.16, angle=0.0, rgb=(1, 1, 1)
    )
    drawn = []
    for name in SHAPES if kind == "shape" else GLYPHS:
        if kind == "shape":
            changed = dataclasses.replace(scene, shape=name)
        else:
            place = {
                "glyph_x": 0.5,
                "glyph_y": 0.5,
                "glyph_size": 0.12,
                "glyph_tone": 1.0,
                "rgb": (0, 0, 0),
                "radius": 0.001,
            }
            changed = dataclasses.replace(scene, glyph=name, **place)
        drawn.append(frames_of(dataclasses.replace(spec, scenes=(changed,)), [0.0], 224)[0].mean(0))
    return drawn


@pytest.mark.parametrize("kind", ["shape", "glyph"])
def test_shapes_and_glyphs_look_different(kind: str) -> None:
    drawn = _silhouettes(kind)
    for a, b in itertools.combinations(drawn, 2):
        overlap = float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum())
        assert overlap < 0.86
        assert float(a.sum()) > 500


def test_a_cut_happens_at_its_time() -> None:
    spec = sample_clip(2)
    cut = spec.scenes[1].start_s
    before, after = frames_of(spec, [cut - 0.01, cut])
    assert float((before - after).abs().mean()) > 0.02
    times = torch.tensor([[cut - 0.01, cut, spec.duration_s + 5]])
    assert labels(to_tensors(pack([spec])), times, times)["frame_scene"].tolist() == [
        [0, 1, len(spec.scenes) - 1]
    ]


def test_labels_agree_with_the_spec() -> None:
    specs = [sample_clip(seed, 24.0) for seed in range(6)]
    packed = to_tensors(pack(specs))
    times = torch.arange(0, 24, 0.04).expand(6, -1)
    found = labels(packed, times, times)
    for i, spec in enumerate(specs):
        for j in range(0, times.shape[1], 7):
            time = float(times[i, j])
            scene = spec.scene_at(time)
            for kind in ("frame", "audio"):
                assert SHAPES[found[f"{kind}_shape"][i, j]] == scene.shape
                assert COLOURS[found[f"{kind}_colour"][i, j]] == scene.colour
                assert (None, *GLYPHS)[found[f"{kind}_glyph"][i, j]] == scene.glyph
            words = [w for w in spec.words if w.start_s <= time < w.end_s]
            sounds = [s for s in spec.sounds if s.start_s <= time < s.end_s]
            assert found["audio_word"][i, j] == (WORDS.index(words[0].word) + 1 if words else 0)
            assert found["audio_sound"][i, j] == (SOUNDS.index(sounds[0].sound) + 1 if sounds else 0)
            for event in (*words, *sounds):
                quarter = int(4 * (time - event.start_s) / (event.end_s - event.start_s)) + 1
                assert (
                    abs(int(found["audio_phase"][i, j]) - quarter) <= 1
                )  # float32 against float64 at an edge
            assert bool(found["audio_phase"][i, j]) == bool(words or sounds)


def test_words_are_heard_at_their_time_and_gain(bank: WordBank) -> None:
    for seed in range(8):
        spec = sample_clip(seed)
        spec = dataclasses.replace(spec, noise_gain=-200.0, hum_gain=-200.0, echo=(0.01, 0.0), sounds=())
        spec = dataclasses.replace(spec, words=tuple(dataclasses.replace(w, tilt=0.0) for w in spec.words))
        wave = render_audio(to_tensors(pack([spec])), bank, 256_000)[0]
        heard = torch.zeros(256_000, dtype=torch.bool)
        for word in spec.words:
            a, b = round(word.start_s * 16000), round(word.end_s * 16000)
            heard[a - 2 : b + 2] = True
            level = float(wave[a:b].square().mean().sqrt())
            assert level == pytest.approx(0.0707 * 10 ** (word.gain / 20), rel=0.1)
            spectrum = torch.fft.rfft(wave[a:b]).abs()
            pitch = float(spectrum.argmax()) * 16000 / (b - a)
            assert pitch == pytest.approx((200 + 40 * WORDS.index(word.word)) * word.rate, rel=0.02)
        assert float(wave[~heard].abs().max()) < 1e-8


def test_sounds_are_heard_in_their_place_alone(bank: WordBank) -> None:
    for seed in range(30):
        spec = dataclasses.replace(
            sample_clip(seed), words=(), noise_gain=-200.0, hum_gain=-200.0, echo=(0.01, 0.0)
        )
        wave = render_audio(to_tensors(pack([spec])), bank, 256_000)[0]
        heard = torch.zeros(256_000, dtype=torch.bool)
        for sound in spec.sounds:
            a, b = round(sound.start_s * 16000), round(sound.end_s * 16000)
            heard[a - 2 : b + 2] = True
            assert float(wave[a:b].square().mean().sqrt()) > 0.12 * 0.13 * 10 ** (sound.gain / 20)
        assert float(wave[~heard].abs().max()) < 1e-8


def test_audio_is_finite_in_range_and_the_same_for_any_batch(bank: WordBank) -> None:
    specs = [sample_clip(seed, 16.0, "test") for seed in range(4)]
    together = render_audio(to_tensors(pack(specs)), bank, 256_000)
    assert together.shape == (4, 256_000)
    assert together.isfinite().all()
    assert float(together.abs().max()) < 1
    for i, spec in enumerate(specs):
        assert torch.allclose(
            render_audio(to_tensors(pack([spec])), bank, 256_000)[0], together[i], atol=1e-6
        )


def test_packing_has_fixed_sizes_and_says_what_does_not_fit() -> None:
    sizes = {tuple(array.shape for array in pack([sample_clip(seed)]).values()) for seed in range(40)}
    assert len(sizes) == 1
    mixed = pack([sample_clip(0, 16.0), sample_clip(0, 64.0)])
    assert mixed["scene_start"].shape == (2, 15)
    with pytest.raises(UsageError, match="does not fit"):
        pack([sample_clip(0, 64.0)], Maxima(4, 4, 1))


def test_too_large_frames_are_refused() -> None:
    with pytest.raises(UsageError, match="1024 px"):
        frames_of(sample_clip(0), [0.0], 1024)


def test_rendering_has_no_graph_break() -> None:
    """The trainer compiles the renderer: nothing in it may depend on data."""
    packed = to_tensors(pack([sample_clip(0)]))
    constants = render.assets()
    compiled = torch.compile(render_frames, fullgraph=True, backend="eager")
    times = torch.tensor([[0.0, 5.0]])
    assert torch.equal(compiled(packed, times, 56, constants), render_frames(packed, times, 56, constants))
