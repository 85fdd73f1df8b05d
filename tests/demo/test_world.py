"""Clips keep the world's promises: places of cuts, shapes, words and sounds, and splits that never meet."""

import itertools
import json
import math

import pytest

from seats_cli.demo import world
from seats_cli.demo.nouns import GLYPHS, SAMPLE_RATE, SHAPES, SOUNDS, WORDS
from seats_cli.demo.voices import voice_numbers, voices
from seats_cli.demo.world import maxima, sample_clip
from seats_cli.errors import UsageError

DURATIONS = (8.0, 16.0, 24.0, 32.0, 64.0)


def clips(n: int, split: str = "train") -> list[world.ClipSpec]:
    return [sample_clip(seed, duration, split) for duration in DURATIONS for seed in range(n)]


def test_nouns_are_distinct_and_of_the_promised_number() -> None:
    counts = [len(SHAPES), len(world.COLOURS), len(world.MOTIONS), len(GLYPHS), len(WORDS), len(SOUNDS)]
    assert counts == [8, 8, 5, 24, 64, 8]
    nouns = [*SHAPES, *world.COLOURS, *world.MOTIONS, *GLYPHS, *WORDS, *SOUNDS, *world.NUMBERS]
    assert len(set(nouns)) == len(nouns)


def test_scenes_fill_the_clip_on_the_grid() -> None:
    for clip in clips(60):
        edges = [scene.start_s for scene in clip.scenes] + [clip.scenes[-1].end_s]
        assert edges[0] == 0
        assert edges[-1] == clip.duration_s
        assert all(edge % world.GRID_S == 0 for edge in edges)
        for before, after in itertools.pairwise(clip.scenes):
            assert before.end_s == after.start_s
            assert before.shape != after.shape
        assert all(2 <= scene.end_s - scene.start_s <= world.MAX_SCENE_S for scene in clip.scenes)


def test_shapes_move_visibly_and_short_scenes_keep_them_in_the_frame() -> None:
    for scene in (scene for clip in clips(60) for scene in clip.scenes):
        direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}[
            scene.motion
        ]
        speed = math.hypot(scene.vx, scene.vy)
        assert (scene.vx, scene.vy) == pytest.approx((direction[0] * speed, direction[1] * speed))
        assert scene.motion == "still" or speed >= 0.125
        length = scene.end_s - scene.start_s
        if length <= 4.5:
            for x, v in ((scene.x, scene.vx), (scene.y, scene.vy)):
                assert scene.radius <= min(x, x + v * length) + 0.01
                assert max(x, x + v * length) <= 1.01 - scene.radius


def test_a_glyph_keeps_clear_of_the_path_of_the_shape() -> None:
    for scene in (scene for clip in clips(60) for scene in clip.scenes if scene.glyph):
        apart = abs(scene.glyph_y - scene.y) if scene.vx else abs(scene.glyph_x - scene.x)
        if scene.motion == "still":
            apart = max(abs(scene.glyph_y - scene.y), abs(scene.glyph_x - scene.x))
        assert apart > scene.radius + scene.glyph_size
        for place in (scene.glyph_x, scene.glyph_y):
            assert scene.glyph_size < place < 1 - scene.glyph_size


def test_nothing_heard_overlaps_or_comes_near_a_cut() -> None:
    for clip in clips(60):
        heard = sorted((event.start_s, event.end_s) for event in (*clip.words, *clip.sounds))
        assert all(before[1] < after[0] for before, after in itertools.pairwise(heard))
        for start, end in heard:
            scene = clip.scene_at(start)
            assert scene.start_s + world.CUT_MARGIN_S <= start
            assert end <= scene.end_s - world.CUT_MARGIN_S + 1e-9
        assert len(clip.words) >= 2
        assert len(clip.sounds) >= 1
        assert len({word.word for word in clip.words}) == len(clip.words)
        assert [*clip.words] == sorted(clip.words, key=lambda word: word.start_s)


def test_a_word_lasts_as_long_as_its_recording() -> None:
    for word in (word for clip in clips(10) for word in clip.words):
        samples = voices()[word.voice].lengths[WORDS.index(word.word)]
        assert word.end_s - word.start_s == pytest.approx(samples / SAMPLE_RATE / word.rate)
        assert -10 <= word.gain <= 4


def test_clips_fit_their_maxima() -> None:
    for clip in clips(100):
        sizes = maxima(clip.duration_s)
        assert (len(clip.scenes), len(clip.words), len(clip.sounds)) <= (
            sizes.scenes,
            sizes.words,
            sizes.sounds,
        )
        assert len(clip.words) <= sizes.words
        assert len(clip.sounds) <= sizes.sounds


def test_a_seed_is_a_clip_and_splits_differ() -> None:
    assert sample_clip(5, 16.0, "dev") == sample_clip(5, 16.0, "dev")
    seen = {json.dumps(sample_clip(5, 16.0, split).to_json()["scenes"]) for split in world.SPLITS}
    assert len(seen) == len(world.SPLITS)
    assert sample_clip(5, 16.0) != sample_clip(6, 16.0)


def test_voices_and_sounds_of_the_splits_never_meet() -> None:
    used = {split: {word.voice for clip in clips(40, split) for word in clip.words} for split in world.SPLITS}
    for split, numbers in used.items():
        assert numbers <= set(voice_numbers(split))
    assert not any(used[a] & used[b] for a, b in itertools.combinations(world.SPLITS, 2))
    for split in ("train", "test"):
        values = [
            value for c in clips(40, split) for sound in c.sounds for value in (sound.pitch, sound.wobble)
        ]
        held_out = [0.4 <= value < 0.5 or 0.75 <= value <= 0.85 for value in values]
        assert all(held_out) if split == "test" else not any(held_out)


def test_fewer_voices_can_be_asked_for() -> None:
    heard = {word.voice for seed in range(50) for word in sample_clip(seed, 16.0, n_voices=3).words}
    assert heard == {0, 1, 2}


@pytest.mark.parametrize("duration", [4.0, 16.3, 500.0])
def test_impossible_durations_are_refused(duration: float) -> None:
    with pytest.raises(UsageError, match="cannot be drawn"):
        sample_clip(0, duration)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match="validation"):
        sample_clip(0, 16.0, "validation")


def test_a_spec_is_plain_json() -> None:
    document = json.loads(json.dumps(sample_clip(1).to_json()))
    assert document["scenes"][0]["shape"] in SHAPES
    assert document["duration_s"] == 16.0
