"""The word bank: small, complete, in line with its index, and the same through its export."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from seats_cli.demo.nouns import MAX_WORD_S, SAMPLE_RATE, WORDS
from seats_cli.demo.voices import (
    FOLDER,
    WordBank,
    export,
    load_bank,
    main,
    mu_law_decode,
    mu_law_encode,
    voice_numbers,
    voices,
)
from seats_cli.errors import UsageError


@pytest.fixture(scope="module")
def bank() -> WordBank:
    return load_bank()


def test_bank_is_complete_and_small(bank: WordBank) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_800_000
    assert bank.samples.shape[:2] == bank.lengths.shape == (len(voices()), len(WORDS))
    assert len(set(bank.names)) == len(bank.names)
    counts = {split: len(voice_numbers(split)) for split in ("train", "dev", "test", "ood")}
    assert counts["train"] >= 36
    assert (counts["dev"], counts["test"], counts["ood"]) == (2, 2, 5)
    assert all(
        name.startswith("flite") for name, s in zip(bank.names, bank.splits, strict=True) if s == "ood"
    )


def test_words_are_short_loud_and_unclipped(bank: WordBank) -> None:
    assert int(bank.lengths.max()) <= MAX_WORD_S * SAMPLE_RATE
    assert int(bank.lengths.min()) > 0.1 * SAMPLE_RATE
    rms = (bank.samples.square().sum(-1) / bank.lengths).sqrt()
    assert float(rms.min()) > 0.02
    assert float(rms.max()) < 0.12
    assert float((bank.samples.abs() >= 0.99).float().mean()) < 1e-5
    beyond = torch.arange(bank.samples.shape[-1]) >= bank.lengths.unsqueeze(-1)
    assert not bank.samples[beyond].any()


def test_each_word_lies_where_the_index_says(bank: WordBank) -> None:
    # Between two words is silence, so energy at the ends of a word must be small against its middle.
    edge = 32
    ends = torch.stack(
        [
            bank.samples[v, w, int(n) - edge : int(n)].square().mean().sqrt()
            for v, row in enumerate(bank.lengths)
            for w, n in enumerate(row)
        ]
    )
    starts = bank.samples[..., :edge].square().mean(-1).sqrt()
    assert float(ends.median()) < 0.01
    assert float(starts.median()) < 0.01


def _spectra(bank: WordBank) -> torch.Tensor:
    """(V, W, 24 * 20): log spectra of each word, stretched to one length."""
    edges = np.geomspace(3, 200, 21).astype(int)
    window = torch.hann_window(400)
    rows = []
    for voice in range(len(bank.names)):
        for word in range(len(WORDS)):
            wave = bank.samples[voice, word, : int(bank.lengths[voice, word])]
            power = torch.stft(wave, 400, 160, window=window, return_complex=True).abs().square()
            bands = torch.stack([power[a:b].sum(0) for a, b in itertools.pairwise(edges)])
            log = torch.log10(bands + bands.max() * 1e-4)
            log = log[:, torch.linspace(0, log.shape[1] - 1, 24).round().long()]
            rows.append(((log - log.mean()) / log.std()).flatten())
    return torch.stack(rows).view(len(bank.names), len(WORDS), -1)


def test_words_are_told_apart_across_voices(bank: WordBank) -> None:
    """A nearest neighbour among the training voices finds nearly every word of a held-out voice."""
    spectra = _spectra(bank)
    known = spectra[list(voice_numbers("train"))]
    for split, least in (("dev", 0.8), ("test", 0.95)):
        for number in voice_numbers(split):
            away = torch.cdist(spectra[number][None], known).amin(0)
            right = (away.argmin(1) == torch.arange(len(WORDS))).float().mean()
            assert float(right) >= least, bank.names[number]


def test_export_reads_back_the_same(tmp_path: Path, bank: WordBank) -> None:
    size = export(tmp_path / "bank.npz")
    assert size < 20_000_000
    back = load_bank(path=tmp_path / "bank.npz")
    assert torch.equal(back.lengths, bank.lengths)
    assert (back.names, back.splits) == (bank.names, bank.splits)
    error = (back.samples - bank.samples).square().sum() / bank.samples.square().sum()
    assert float(error) < 1e-3  # 30 dB
    train = load_bank(split="train", path=tmp_path / "bank.npz")
    assert train.names == bank.names[: len(train.names)]
    assert set(train.splits) == {"train"}


def test_mu_law_keeps_silence_and_order() -> None:
    wave = np.array([-1.0, -0.3, -1e-3, 0.0, 1e-3, 0.3, 1.0], np.float32)
    back = mu_law_decode(mu_law_encode(wave))
    assert back[3] == 0
    assert np.all(np.diff(back) > 0)
    assert np.allclose(back, wave, atol=0.01)


def test_bank_of_an_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match="dev"):
        load_bank(split="dev")


def test_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "b.npz")]) == 0
    assert "bytes" in capsys.readouterr().err
    assert (tmp_path / "b.npz").exists()
