"""Packed specs to waveforms: spoken words from the bank, sounds from formulas, noise, hum and an echo.

Like the renderer of frames: batched, without shapes that depend on data, without synchronisation.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from seats_cli.demo.nouns import SAMPLE_RATE, SOUNDS
from seats_cli.demo.voices import WordBank
from seats_cli.demo.world import MAX_SOUND_S, MIN_RATE

TABLE = 1 << 18  # samples in the table of noise
SOUND_LEVEL = 0.13
SLACK = 0.97  # a word's rate wavers by 3%, so that it can be this much slower than MIN_RATE
TAU = 2 * math.pi


@lru_cache(maxsize=8)
def noise_table(device: str | torch.device = "cpu") -> torch.Tensor:
    """(TABLE,) white Gaussian noise on `device`, the same on every machine."""
    noise = np.random.default_rng(35).standard_normal(TABLE, dtype=np.float32)
    return torch.from_numpy(noise).to(device)


def render_audio(
    packed: Mapping[str, torch.Tensor], bank: WordBank, n_samples: int, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, n_samples) float32 in [-1, 1], 16 kHz. noise: `noise_table(device)`, cached when not given."""
    device = packed["seed"].device
    table = noise if noise is not None else noise_table(device)
    words, word_at = _spoken(packed, bank)
    sounds, sound_at = _sounded(packed, table)
    longest = max(words.shape[-1], sounds.shape[-1])
    dry = torch.zeros(len(words), n_samples + longest, device=device)
    for wave, at in ((words, word_at), (sounds, sound_at)):
        place = at.clamp(max=n_samples).unsqueeze(-1) + torch.arange(wave.shape[-1], device=device)
        dry.scatter_add_(1, place.flatten(1), wave.flatten(1))
    dry = dry[:, :n_samples]
    noise_gain, hum_gain, hum_hz, delay, strength = packed["clip_values"].unsqueeze(-1).unbind(1)
    index = torch.arange(n_samples, device=device).unsqueeze(0)
    earlier = index - (delay * SAMPLE_RATE).long()
    echo = dry.gather(1, earlier.clamp(min=0)) * (earlier >= 0)
    hiss = table[(index + packed["seed"].unsqueeze(1)) % TABLE]
    turn = TAU * torch.remainder(index * (hum_hz / SAMPLE_RATE), 1.0)
    hum = torch.sin(turn) + 0.5 * torch.sin(2 * turn) + 0.3 * torch.sin(3 * turn)
    return (dry + strength * echo + noise_gain * hiss + hum_gain * hum).clamp(-1, 1)


def _spoken(packed: Mapping[str, torch.Tensor], bank: WordBank) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, W, L) words at their rate, tilt and gain, and (B, W) the sample at which each begins."""
    start, _, gain, rate, tilt = packed["word_values"].unsqueeze(-1).unbind(2)
    word, voice = packed["word_ids"].unsqueeze(-1).unbind(2)
    spoken = (word - 1).clamp(min=0)
    _, n_words, max_len = bank.samples.shape
    longest = math.ceil(max_len / (MIN_RATE * SLACK)) + 1
    position = torch.arange(longest, device=start.device) * rate
    whole = position.long()
    fraction = position - whole
    length = bank.lengths.flatten()[voice * n_words + spoken]
    base = (voice * n_words + spoken) * max_len
    flat = bank.samples.flatten()

    def at(shift: int) -> torch.Tensor:
        i = whole + shift
        return flat[base + i.clamp(0, max_len - 1)].float() * ((i >= 0) & (i < length))

    before, here, after = at(-1), at(0), at(1)
    now = here + fraction * (after - here)
    past = before + fraction * (here - before)
    wave = (now - tilt * past) * (gain * (word > 0)) / torch.sqrt(1 + tilt**2)
    return wave, _begin(start)


def _begin(start: torch.Tensor) -> torch.Tensor:
    return torch.round(start.squeeze(-1) * SAMPLE_RATE).long()


def _sounded(packed: Mapping[str, torch.Tensor], table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, K, L) sounds and (B, K) the sample at which each begins. Formulas in the order of SOUNDS."""
    start, end, gain, pitch, wobble = packed["sound_values"].unsqueeze(-1).unbind(2)
    kind = packed["sound_ids"].unsqueeze(-1)
    n = math.ceil(MAX_SOUND_S * SAMPLE_RATE)
    t = torch.arange(n, device=start.device) / SAMPLE_RATE
    length = (end - start).clamp(min=1e-3)
    low, ratio = 300 + 350 * pitch, 2.6 + 1.2 * wobble
    sweep = 0.5 * (ratio - 1) * t * t / length
    beep = 520 + 900 * pitch
    click = torch.remainder(t, 1 / (7 + 7 * wobble))
    rate = 1.8 + 2.4 * wobble
    seat = torch.arange(n, device=start.device) + (packed["seed"][:, None, None] * 31) % (TABLE // 2)
    hiss, smooth = table[seat], (table[seat] + table[seat + 1] + table[seat + 2] + table[seat + 3]) * 0.5
    bell = 620 + 700 * pitch
    waves = {
        "beep": torch.sin(TAU * beep * t) * (torch.sin(TAU * (1.6 + 1.6 * wobble) * t) > -0.5),
        "chirp": torch.sin(TAU * low * (t + sweep)),
        "whistle": torch.sin(TAU * low * (ratio * t - sweep)),
        "buzz": 0.8 * torch.tanh((2 + 4 * wobble) * torch.sin(TAU * (75 + 75 * pitch) * t)),
        "bell": 1.3
        * torch.exp(-(3 + 3 * wobble) * t)
        * (
            torch.sin(TAU * bell * t)
            + 0.6 * torch.sin(TAU * 2.76 * bell * t)
            + 0.4 * torch.sin(TAU * 5.4 * bell * t)
        ),
        "clicks": 3 * torch.exp(-250 * click) * torch.sin(TAU * (1300 + 1500 * pitch) * click),
        "whoosh": torch.sin(math.pi * t / length) ** 2 * torch.lerp(smooth, hiss, pitch),
        "siren": torch.sin(
            TAU * (650 + 350 * pitch) * t - (200 + 150 * wobble) / rate * torch.cos(TAU * rate * t)
        ),
    }
    wave = torch.zeros_like(t + start)
    for i, name in enumerate(SOUNDS):
        wave = torch.where(kind == i + 1, waves[name], wave)
    fade = (t / 0.012).clamp(0, 1) * ((length - t) / 0.02).clamp(0, 1)
    return wave * fade * (SOUND_LEVEL * gain), _begin(start)
