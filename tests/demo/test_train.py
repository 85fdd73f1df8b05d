"""The trainer, on a network small enough for a CPU."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

import seats_cli.demo
from seats_cli.demo import voices
from seats_cli.demo.by_voice import by_voice
from seats_cli.demo.questions import FAMILIES
from seats_cli.demo.train import Log, Run, main, phases_of, train
from seats_cli.demo.trainer import Outputs, Trainer

CONFIG = yaml.safe_load("""
seed: 1
geometry:
  text: {hidden_size: 64, num_hidden_layers: 3, num_attention_heads: 2, num_key_value_heads: 1,
         intermediate_size: 64, max_position_embeddings: 4096, rope_theta: 10000.0, mrope_section: [4, 6, 6]}
  vision: {depth: 2, hidden_size: 32, num_heads: 2, intermediate_size: 64, window_size: 56,
           fullatt_block_indexes: [1]}
  audio: {d_model: 32, encoder_layers: 1, encoder_attention_heads: 2, encoder_ffn_dim: 64}
frame_size: 56
questions_per_clip: 4
question_tokens: 100
phases:
  - {sizes: [[8, 2]], steps: 2, lr: [1.0, 1.0], warmup: 2, disguised: false}
  - {sizes: [[8, 2], [10, 1]], steps: 2, lr: [0.6, 0.0], warmup: 1, disguised: true}
muon: {lr: 0.012, momentum: 0.95, weight_decay: 0.1}
adamw: {lr: 0.0015, betas: [0.9, 0.95], weight_decay: 0.0}
clip_gradient: 1.0
auxiliary: {encoder: 0.3, sync: 0.3, sync_after_layer: 2}
late_removal: {start: 1, share: 0.75, first: 2, last: 3}
evaluation: {every: 1000, clips: 2, final: [[test, 8, 2, 2, [null, 2]]]}
workers: 0
""")
CPU = torch.device("cpu")


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.thinker.state_dict().items()}


@pytest.fixture(scope="module", autouse=True)
def _one_bank():
    """Decode the word bank once for all trainers of this file."""
    bank = voices.load_bank(CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voices, "load_bank", lambda *_, **__: bank)
        yield


@pytest.fixture(scope="module")
def trainer():
    """For tests that leave the weights alone."""
    return Trainer(copy.deepcopy(CONFIG), CPU, None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and the weights at its end."""
    out = tmp_path_factory.mktemp("whole")
    trainer = Trainer(copy.deepcopy(CONFIG), CPU, None)
    assert train(trainer, Run(out)) == 4
    return out, _weights(trainer)


def test_the_shipped_recipe_is_well_formed():
    config = yaml.safe_load((Path(seats_cli.demo.__file__).parent / "train.yaml").read_text())
    phases = phases_of(config)
    assert phases[0].first == 0
    assert all(a.end == b.first for a, b in itertools.pairwise(phases))
    assert phases[-1].learning_rate(phases[-1].end - 1) < 0.001
    layers = config["geometry"]["text"]["num_hidden_layers"]
    assert 1 <= config["late_removal"]["first"] <= config["late_removal"]["last"] == layers
    assert 0 < config["late_removal"]["start"] < phases[-1].end


def test_learning_rate_warms_up_and_falls_linearly():
    config = {"phases": [dict(CONFIG["phases"][0], steps=100, warmup=10, lr=[1.0, 1.0])]}
    config["phases"].append(dict(CONFIG["phases"][0], steps=50, warmup=0, lr=[0.8, 0.2]))
    first, second = phases_of(config)
    assert first.learning_rate(0) == pytest.approx(0.1)
    assert first.learning_rate(9) == first.learning_rate(99) == 1.0
    assert second.learning_rate(100) == pytest.approx(0.8)
    assert second.learning_rate(125) == pytest.approx(0.5)
    assert second.learning_rate(149) == pytest.approx(0.2, abs=0.02)


def test_a_step_lowers_the_loss_on_its_own_batch():
    trainer = Trainer(copy.deepcopy(CONFIG), CPU, None)
    size = trainer.size(8.0, 2)
    (_, batch), *_ = trainer.batches((size,), "train", 0, 1)
    dropped = torch.zeros(3, 2, dtype=torch.bool)
    losses = []
    for _ in range(4):
        out = trainer.run(batch, size.seconds, dropped, augment=False)
        norm = trainer.step(out, (0.3, 0.3), encoder=0.3, sync=0.3, clip=1.0)
        losses.append(out.answer.item())
        assert all(math.isfinite(x.item()) for x in (out.answer, out.encoder, out.sync, norm))
    assert losses[-1] < losses[0] - 0.1


def test_probes_can_settle_without_moving_the_model(trainer):
    size = trainer.size(8.0, 2)
    (_, batch), *_ = trainer.batches((size,), "train", 0, 1)
    dropped = torch.zeros(3, 2, dtype=torch.bool)
    out = trainer.run(batch, size.seconds, dropped, augment=False, probes_only=True)
    (out.encoder + out.sync).backward()
    assert all(p.grad is None for p in trainer.thinker.parameters())
    assert all(p.grad is not None for p in trainer.probes.parameters())


def test_late_layers_are_random_suffixes_and_seeded(trainer):
    drawn = [trainer.late_layers(400, torch.Generator().manual_seed(s), True) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    dropped = drawn[0]
    assert not dropped[0].any()  # `first` is layer 2
    assert (dropped[1:] >= dropped[:-1]).all()  # once gone, gone
    assert float(dropped[-1].float().mean()) == pytest.approx(0.75, abs=0.08)
    assert not trainer.late_layers(400, torch.Generator().manual_seed(1), False).any()


def test_a_run_writes_log_state_and_checkpoint(whole):
    out, _ = whole
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["test"]
    assert set(rows[0]["late"]) == {"None", "2"}
    assert all(0 <= share <= 1 for share in rows[0]["late"]["None"].values())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (out / "checkpoint").iterdir()
    }


def test_resumed_training_equals_uninterrupted_training(whole, tmp_path):
    _, expected = whole
    stopped = Trainer(copy.deepcopy(CONFIG), CPU, None)
    assert train(stopped, Run(tmp_path, stop_after_s=0.0, evaluate=False)) == 1
    trainer = Trainer(copy.deepcopy(CONFIG), CPU, None)
    first = trainer.load(tmp_path / "state.pt")
    assert first == 1
    assert train(trainer, Run(tmp_path, first, evaluate=False)) == 4
    resumed = _weights(trainer)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_init_takes_the_weights_and_runs_the_later_phases_alone(whole, tmp_path):
    out, expected = whole
    trainer = Trainer(dict(copy.deepcopy(CONFIG), seed=9), CPU, None)
    trainer.start_from(out / "checkpoint")
    loaded = _weights(trainer)
    for name, value in expected.items():
        wanted = value.to(torch.bfloat16).float() if value.is_floating_point() else value
        torch.testing.assert_close(loaded[name], wanted, atol=1e-6, rtol=0)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    arguments = ["--out", str(tmp_path / "new"), "--config", str(config), "--device", "cpu"]
    main([*arguments, "--skip-evaluation", "--init", str(out / "checkpoint"), "--start-phase", "2"])
    assert torch.load(tmp_path / "new" / "state.pt", weights_only=True)["step"] == 4


@pytest.mark.parametrize("wrong", [["--start-phase", "2"], ["--start-phase", "3", "--init", "x"]])
def test_phases_cannot_be_skipped_without_their_weights(wrong, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--config", str(config), *wrong])
    assert "--start-phase" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_training(bad, tmp_path):
    fine = torch.tensor(1.0)
    out = Outputs(torch.tensor(bad), fine, fine, torch.ones(1, 64) > 0, torch.zeros(1, 9).long())
    with (tmp_path / "log.jsonl").open("w") as file, pytest.raises(RuntimeError, match="diverged at step 25"):
        Log(file).losses(25, 1.0, out, fine)


def test_accuracy_by_voice_counts_every_word_once(trainer):
    size = trainer.size(8.0, 2)
    found = by_voice(trainer, "ood", size, 4)
    targets = torch.cat([b["targets"] for _, b in trainer.batches((size,), "ood", 0, 2)])
    docs = torch.cat([b["doc"] for _, b in trainer.batches((size,), "ood", 0, 2)])
    families = torch.cat([b["family"] for _, b in trainer.batches((size,), "ood", 0, 2)])
    transcripts = (families.gather(1, docs) == FAMILIES.index("transcription")) & (targets >= 0)
    ends = transcripts & (targets == trainer.token_id["<|im_end|>"])
    assert sum(n["asked"] for n in found["words"].values()) == int((transcripts & ~ends).sum()) > 0
    assert all(0 <= n["right"] <= n["asked"] for n in found["words"].values())
    assert all(name.startswith("flite:") for name in found["words"])
