"""Without augmentation, training reads exactly what `seats ask` reads."""

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from seats_cli.demo.augment import SensorNoise, _centres, disguise, log_mel, patches_of, sample_times
from seats_cli.model.preprocess import PixelStats, patchify

_STATS = PixelStats(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 1 / 255, 1, 1_000_000
)


def _noise() -> SensorNoise:
    return SensorNoise(0, torch.device("cpu"))


def test_patches_equal_the_preprocessor():
    frames = torch.randint(0, 256, (2, 4, 3, 56, 84), dtype=torch.uint8)
    ours = patches_of(_noise(), frames.float() / 255, augment=False)
    for clip, patches in zip(frames, ours, strict=True):
        theirs = patchify(clip.permute(0, 2, 3, 1), _STATS, patch=14, temporal_patch=2, merge=2)
        torch.testing.assert_close(patches, theirs, atol=1e-5, rtol=1e-5)


def test_mel_equals_whispers_feature_extractor():
    waves = torch.randn(2, 16000) * torch.tensor([[0.1], [0.01]])
    extractor = WhisperFeatureExtractor(feature_size=128)
    for wave, mel in zip(waves, log_mel(_noise(), waves, augment=False), strict=True):
        theirs = extractor(wave.numpy(), sampling_rate=16000, return_tensors="np")["input_features"][0][
            :, :100
        ]
        np.testing.assert_allclose(mel.numpy(), theirs, atol=1e-4)


def test_augmentation_changes_the_input_and_repeats_with_the_seed():
    noise, waves = _noise(), torch.randn(2, 16000) * 0.1
    noise.seed(3)
    first = log_mel(noise, waves, augment=True)
    again_other = log_mel(noise, waves, augment=True)
    noise.seed(3)
    assert torch.equal(first, log_mel(noise, waves, augment=True))
    assert not torch.allclose(first, again_other, atol=1e-3)


def test_frame_times_are_those_of_a_12_fps_file():
    times = sample_times(_noise(), 1, 16.0, augment=False)[0]
    assert times.shape == (32,)
    np.testing.assert_allclose(times.numpy(), np.linspace(0, 191, 32) / 12, atol=1e-5)


def test_a_disguise_repeats_with_the_seed_and_differs_between_clips():
    noise, wave = _noise(), torch.randn(1, 32000) * 0.1
    waves = wave.expand(3, -1)
    noise.seed(4)
    first = log_mel(noise, waves, augment=True, disguised=True)
    noise.seed(4)
    assert torch.equal(first, log_mel(noise, waves, augment=True, disguised=True))
    assert first.isfinite().all()
    assert first.shape == (3, 128, 200)
    assert (first[0] - first[1]).abs().mean() > 0.01


def test_a_disguise_moves_a_tone_by_the_tract_and_keeps_its_time():
    """A tone of 2 kHz from 1.0 to 1.5 s stays one tone, at 1.5 to 2.6 kHz, within 0.15 s of where it was."""
    t = torch.arange(48000) / 16000
    wave = 0.3 * torch.sin(2 * torch.pi * 2000 * t) * ((t >= 1.0) & (t < 1.5))
    noise = _noise()
    noise.seed(5)
    plain = log_mel(noise, wave[None], augment=False)[0]
    mel = disguise(noise, plain.expand(40, -1, -1) * 4 - 4)
    bins = mel[:, :, 120:130].mean(2).argmax(1)
    home = int(plain[:, 120:130].mean(1).argmax())
    assert bins.min() < home - 3
    assert bins.max() > home + 3
    centres = _centres(torch.device("cpu"))
    assert centres[bins.min()] > 1400
    assert centres[bins.max()] < 2800
    loud = mel.gather(1, bins[:, None, None].expand(-1, 1, 300)).squeeze(1)
    threshold = loud.amax(1, keepdim=True) - 1.0
    onset = (loud > threshold).float().argmax(1)
    assert ((onset - 100).abs() <= 15).all()


def test_mel_centres_are_the_filters():
    centres = _centres(torch.device("cpu"))
    frequency = torch.linspace(0, 8000, 201)
    filters = _noise().filters
    peak = frequency[filters.argmax(1)]
    wide = filters.gt(0).sum(1) > 2  # narrow filters fall between the FFT's frequencies
    assert ((peak - centres)[wide].abs() <= 40).all()
    assert (centres.diff() > 0).all()
