"""From rendered frames and waveforms to what the encoders read, with what a camera and a codec would do.

All of it runs in batches on the training device; without `augment` the output equals what
`seats_cli.model.preprocess` makes of the same pixels and samples.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seats_cli.model.preprocess import MelSpec, mel_filters

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as in the checkpoint's preprocessor_config.json
_STD = (0.26862954, 0.26130258, 0.27577711)
_MEL = MelSpec(bins=128, sampling_rate=16000, n_fft=400, hop_length=160)


class SensorNoise:
    """A seeded source of random numbers on the device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device, self.base = device, seed
        self.generator = torch.Generator(device)
        self.filters = mel_filters(_MEL).to(device)  # (128, 201)
        self.window = torch.hann_window(_MEL.n_fft, device=device)

    def seed(self, step: int) -> None:
        """Make what follows depend on the step alone."""
        self.generator.manual_seed(self.base * 1_000_003 + step)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform float32 in [low, high)."""
        return low + (high - low) * torch.rand(*shape, generator=self.generator, device=self.device)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal of x's shape and dtype."""
        return torch.randn(x.shape, generator=self.generator, device=self.device, dtype=x.dtype)


def sample_times(noise: SensorNoise, clips: int, seconds: float, augment: bool) -> Tensor:
    """(B, T) seconds: 2 frames a second, first and last frame included, of files of various frame rates."""
    count = round(seconds * 2)
    fps = (
        noise.uniform(clips, 1, low=8.0, high=30.0)
        if augment
        else torch.full((clips, 1), 12.0, device=noise.device)
    )
    times = torch.arange(count, device=noise.device) * (seconds - 1 / fps) / (count - 1)
    if augment:
        times = times + noise.uniform(clips, count, low=-0.03, high=0.03)
    return times.clamp(0, seconds - 1e-3)


def patches_of(noise: SensorNoise, frames: Tensor, augment: bool) -> Tensor:
    """(B, T, 3, H, W) in [0, 1] -> (B, T/2 * patches, 1176), normalised, in merge-block order."""
    b, t, _, h, w = frames.shape
    x = frames.to(torch.bfloat16) if frames.is_cuda else frames
    if augment:
        gain = noise.uniform(b, 1, 3, 1, 1, low=0.9, high=1.1) * noise.uniform(
            b, 1, 1, 1, 1, low=0.85, high=1.1
        )
        shift = noise.uniform(b, 1, 3, 1, 1, low=-0.04, high=0.04)
        grain = noise.uniform(b, 1, 1, 1, 1, low=0.0, high=0.03)
        x = (x * gain.to(x.dtype) + shift.to(x.dtype) + noise.normal_like(x) * grain.to(x.dtype)).clamp(0, 1)
    mean = torch.tensor(_MEAN, device=x.device, dtype=x.dtype).view(3, 1, 1)
    std = torch.tensor(_STD, device=x.device, dtype=x.dtype).view(3, 1, 1)
    x = (x - mean) / std
    x = x.view(b, t // 2, 2, 3, h // 28, 2, 14, w // 28, 2, 14)
    return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(b, -1, 3 * 2 * 14 * 14)


def log_mel(noise: SensorNoise, waves: Tensor, augment: bool, disguised: bool = False) -> Tensor:
    """(B, N) 16 kHz samples -> (B, 128, N/160) log-mel as Whisper's feature extractor makes it.

    augment: a random smooth equaliser, a random low-pass and loudness, all in the mel domain; disguised: also
    what `disguise` does to voices.
    """
    waves = F.pad(waves, (0, _MEL.n_fft))  # silence follows a clip; only its start is reflected
    spectrum = torch.stft(waves, _MEL.n_fft, _MEL.hop_length, window=noise.window, return_complex=True)
    power = spectrum[..., : (waves.shape[1] - _MEL.n_fft) // _MEL.hop_length].abs().square()
    mel = mel_of(noise.filters, power).clamp(min=1e-10).log10()
    if augment and disguised:
        mel = disguise(noise, mel)
    if augment:
        mel = (mel + _equaliser(noise, len(waves))[:, :, None]).clamp(min=-10.0)
    mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (mel + 4.0) / 4.0


def _equaliser(noise: SensorNoise, b: int) -> Tensor:
    """(B, 128) what a random microphone and loudness add to a log10 mel."""
    x = torch.linspace(0, 1, _MEL.bins, device=noise.device)
    curve = torch.zeros(b, _MEL.bins, device=noise.device)
    for order in range(1, 7):
        height = noise.uniform(b, 1, low=-1.0, high=1.0) * (1.2 / order**0.7)
        curve = curve + height * torch.cos(torch.pi * order * x + torch.pi * noise.uniform(b, 1))
    cut = noise.uniform(b, 1, low=0.75, high=1.35)
    return curve - 6.0 * F.relu(x - cut) + noise.uniform(b, 1, low=-0.6, high=0.6)


def disguise(noise: SensorNoise, mel: Tensor) -> Tensor:
    """(B, 128, T) log10 mel -> the same words by other speakers, in other rooms, through other microphones.

    Vocal tracts of 0.8 to 1.25 times the length, formants of other widths, an uneven pace, reverberation,
    coloured noise, other contrast, and erased bands; each clip has its own.
    """
    mel = _reverberate(noise, _change_pace(noise, _stretch_tract(noise, mel)))
    b = len(mel)
    mean = mel.mean(dim=(1, 2), keepdim=True)
    mel = mean + (mel - mean) * noise.uniform(b, 1, 1, low=0.85, high=1.15)
    level = mel.amax(dim=(1, 2), keepdim=True) - noise.uniform(b, 1, 1, low=3.0, high=7.0)
    hiss = -noise.uniform(*mel.shape, low=1e-6).log()  # the power of Gaussian noise is exponential
    colour = 0.7 * _equaliser(noise, b)[:, :, None]
    mel = (10**mel + 10 ** (level + colour) * hiss).clamp(min=1e-10).log10()
    bins = torch.arange(_MEL.bins, device=mel.device)
    for _ in range(2):
        width = (noise.uniform(b, 1, low=-12.0, high=14.0)).clamp(min=0)
        start = noise.uniform(b, 1) * (_MEL.bins - width)
        erased = (bins >= start) & (bins < start + width)
        mel = torch.where(erased[:, :, None], mean, mel)
    return mel


def _stretch_tract(noise: SensorNoise, mel: Tensor) -> Tensor:
    """Move formants by a factor, low and high ones not quite alike, and blur them along the bins."""
    b = len(mel)
    hz = _centres(mel.device)
    x = torch.linspace(-1, 1, _MEL.bins, device=mel.device)
    tract = noise.uniform(b, 1, low=-0.223, high=0.223) + noise.uniform(b, 1, low=-0.07, high=0.07) * x
    wanted = (hz * tract.exp()).clamp(max=8000)
    right = torch.searchsorted(hz, wanted).clamp(1, _MEL.bins - 1)
    source = right - 1 + (wanted - hz[right - 1]) / (hz[right] - hz[right - 1])
    source = source.clamp(0, _MEL.bins - 1)
    bins = torch.arange(_MEL.bins, device=mel.device)
    width = noise.uniform(b, 1, 1, low=-1.5, high=2.5).clamp(min=0.45)
    weights = torch.softmax(-0.5 * ((bins - source[:, :, None]) / width).square(), dim=2)
    with torch.autocast(mel.device.type, enabled=False):
        return weights @ mel


def _centres(device: torch.device) -> Tensor:
    """(128,) Hz at the centre of each bin: Slaney's mel scale from 0 to 8 kHz, linear below 1 kHz."""
    per_mel, log_step = 200 / 3, math.log(6.4) / 27
    top = 15 + math.log(8.0) / log_step
    mels = torch.linspace(0, top, _MEL.bins + 2, device=device)[1:-1]
    return torch.where(mels < 15, per_mel * mels, 1000 * torch.exp(log_step * (mels - 15)))


def _change_pace(noise: SensorNoise, mel: Tensor) -> Tensor:
    """Hurry and hesitate: smooth shifts of time of at most 0.1 s, so that no event leaves its scene."""
    b, _, t = mel.shape
    at = torch.arange(t, device=mel.device, dtype=torch.float32)
    shift = torch.zeros(b, t, device=mel.device)
    for _ in range(3):
        frames = noise.uniform(b, 1, low=20.0, high=100.0)  # of a period
        steep = noise.uniform(b, 1, low=0.0, high=0.22)  # at most 3 * 0.22 < 1: time never runs back
        shift = shift + steep * frames / (2 * torch.pi) * torch.sin(
            2 * torch.pi * (at / frames + noise.uniform(b, 1))
        )
    source = (at + shift).clamp(0, t - 1)
    left = source.long().clamp(max=t - 2)
    part = (source - left)[:, None, :]
    left = left[:, None, :].expand_as(mel)
    return torch.lerp(mel.gather(2, left), mel.gather(2, left + 1), part)


def _reverberate(noise: SensorNoise, mel: Tensor) -> Tensor:
    """An exponential tail of up to 64 frames after everything, in half of the clips."""
    b = len(mel)
    seconds = noise.uniform(b, 1, 1, low=0.1, high=0.6)  # until the tail is 60 dB down
    decay = torch.exp(-13.8 * 0.01 / seconds)
    power = 10**mel
    tail = power
    for doubling in range(6):  # sums the powers decay^0 ... decay^63 in six steps
        frames = 2**doubling
        tail = tail + decay**frames * F.pad(tail, (frames, 0))[..., :-frames]
    strength = noise.uniform(b, 1, 1, low=-0.3, high=0.3).clamp(min=0)
    return (power + strength * (tail - power)).clamp(min=1e-10).log10()


def mel_of(filters: Tensor, power: Tensor) -> Tensor:
    """(128, 201) filters applied to (B, 201, T) power, in float32 whatever autocast says."""
    with torch.autocast(power.device.type, enabled=False):
        return filters @ power
