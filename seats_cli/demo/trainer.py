"""The model, its losses and its optimisers, as `python -m seats_cli.demo.train` trains and measures them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seats_cli.demo import render, voices
from seats_cli.demo.augment import SensorNoise, log_mel, patches_of, sample_times
from seats_cli.demo.batches import IGNORED, PackingSpec, Size, batches
from seats_cli.demo.checkpoint import new_thinker, thinker_config
from seats_cli.demo.network import PackedMask, TrainingForward, split_attend
from seats_cli.demo.nouns import COLOURS, GLYPHS, MOTIONS, SHAPES, SOUNDS, WORDS
from seats_cli.demo.optimiser import Muon
from seats_cli.demo.packing import Prefix, prefix_for, vision_grid
from seats_cli.demo.questions import FAMILIES
from seats_cli.demo.tokenizer import load_tokenizer, vocabulary

_LABELS = {"shape": len(SHAPES), "colour": len(COLOURS), "motion": len(MOTIONS), "glyph": len(GLYPHS) + 1}


class Probes(nn.Module):
    """Linear read-outs for the auxiliary losses; trained along, never saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frame = nn.ModuleDict({name: nn.Linear(width, n) for name, n in _LABELS.items()})
        self.word = nn.Linear(width, len(WORDS) + 1)
        self.sound = nn.Linear(width, len(SOUNDS) + 1)
        self.seen_shape = nn.Linear(width, _LABELS["shape"])
        self.seen_colour = nn.Linear(width, _LABELS["colour"])


@dataclass(frozen=True)
class Outputs:
    """Losses of a batch; (B, 64) bool right: was every answer token of a question block the most likely one;
    (B, Q) int64 top: the most likely tokens.
    """

    answer: Tensor
    encoder: Tensor
    sync: Tensor
    right: Tensor
    top: Tensor


class Trainer:
    """Model, optimisers and the static tensors of the current phase on one device."""

    def __init__(self, config: dict[str, Any], device: torch.device, voices_path: Path | None) -> None:
        self.config, self.device = config, device
        self.token_id = vocabulary()
        thinker = new_thinker(thinker_config(config["geometry"], self.token_id), config["seed"])
        self.thinker: Any = thinker.to(device)
        self.probes = Probes(config["geometry"]["text"]["hidden_size"]).to(device)
        compiled = device.type == "cuda"
        self.forward = TrainingForward(self.thinker, torch.compile if compiled else lambda function: function)
        self.render = torch.compile(render.render_frames) if compiled else render.render_frames
        self.noise = SensorNoise(config["seed"], device)
        self.bank = voices.load_bank(device, path=voices_path)
        self.assets = render.assets(device)
        self.tokenizer = load_tokenizer()
        self.grid = vision_grid(self.thinker, config["frame_size"], device)
        self.optimisers = self._optimisers()
        self.prefixes: dict[float, Prefix] = {}
        self.peaks = [[float(group["lr"]) for group in o.param_groups] for o in self.optimisers]

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, p in self.thinker.named_parameters():
            is_matrix = p.ndim == 2 and not any(s in name for s in ("embed_tokens", "lm_head", "bos_eos"))
            (matrices if is_matrix else rest).append(p)
        rest = [p for p in rest if p is not self.thinker.model.audio_tower.audio_bos_eos_token.weight]
        adam = self.config["adamw"]
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": list(self.probes.parameters()), "probes": True},
        ]
        return [
            Muon(matrices, **self.config["muon"]),
            torch.optim.AdamW(
                groups,
                lr=adam["lr"],
                betas=tuple(adam["betas"]),
                weight_decay=adam["weight_decay"],
                fused=self.device.type == "cuda",
            ),
        ]

    def prefix(self, seconds: float) -> Prefix:
        """The prompt up to the question, for clips of this length."""
        if seconds not in self.prefixes:
            prefix = prefix_for(
                self.thinker.config, self.tokenizer, seconds, self.config["frame_size"], self.device
            )
            self.prefixes[seconds] = prefix
        return self.prefixes[seconds]

    def question_tokens(self, seconds: float) -> int:
        """Tokens for questions, such that the whole sequence is a multiple of 128."""
        prefix = len(self.prefix(seconds).ids)
        return -(-(prefix + self.config["question_tokens"]) // 128) * 128 - prefix

    def encode(
        self, batch: dict[str, Tensor], seconds: float, augment: bool, disguised: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render a batch and encode it: video (B, G*n, D), audio (B, A, D), frame times (B, T).

        augment, disguised: see augment.py.
        """
        b = len(batch["ids"])
        with torch.no_grad():
            times = sample_times(self.noise, b, seconds, augment)
            frames = self.render(batch, times, self.config["frame_size"], self.assets)
            waves = render.render_audio(batch, self.bank, round(seconds * 16000))
            patches = patches_of(self.noise, frames, augment)
            mel = log_mel(self.noise, waves, augment, disguised)
        n = patches.shape[1] // (self.config["frame_size"] // 14) ** 2
        patches = patches.view(b * n, -1, patches.shape[-1])
        grid = self.grid
        video = self.forward.encode_video(patches, grid.window_index, grid.cos, grid.sin, grid.window)
        chunks = mel.unflatten(2, (-1, 200)).transpose(1, 2).flatten(0, 1)
        audio = self.forward.encode_audio(chunks)
        return video.view(b, -1, video.shape[-1]), audio.view(b, -1, audio.shape[-1]), times

    def run(
        self,
        batch: dict[str, Tensor],
        seconds: float,
        dropped: Tensor,
        augment: bool,
        disguised: bool = False,
        probes_only: bool = False,
    ) -> Outputs:
        """One forward pass. dropped: (layers, B) bool, layers in which text sees no audio-visual token.

        probes_only: the auxiliary losses train the probes alone.
        """
        prefix = self.prefix(seconds)
        video, audio, times = self.encode(batch, seconds, augment, disguised)
        b, p = len(video), len(prefix.ids)
        embed = self.thinker.model.language_model.embed_tokens.weight
        head = F.embedding(prefix.ids, embed).to(video.dtype).expand(b, -1, -1)
        head = head.index_copy(1, prefix.video_slots, video).index_copy(1, prefix.audio_slots, audio)
        hidden = torch.cat([head, F.embedding(batch["ids"], embed).to(video.dtype)], dim=1)
        offset = batch["offset"] + prefix.next_position
        position = torch.cat([prefix.position[:, None].expand(-1, b, -1), offset.expand(3, -1, -1)], dim=2)
        doc = torch.cat([torch.full((b, p), -1, device=self.device), batch["doc"]], dim=1)
        is_av = F.pad(prefix.is_av, (0, doc.shape[1] - p))
        mask = PackedMask(doc, is_av, prefix.first)
        after = self.config["auxiliary"]["sync_after_layer"]
        final, probe = self.forward.decode(hidden, position, split_attend, mask, dropped, after)
        logits = F.linear(final[:, p:], self.thinker.lm_head.weight).float()
        answer = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED)
        if probes_only:
            video, audio, probe = video.detach(), audio.detach(), probe.detach()
        encoder, sync = self._auxiliary(batch, prefix, video, audio, probe, times)
        top = logits.argmax(-1)
        wrong = (top != batch["targets"]) & (batch["targets"] != IGNORED)
        misses = torch.zeros(b, 64, device=self.device).scatter_add(1, batch["doc"], wrong.float())
        return Outputs(answer, encoder, sync, misses == 0, top)

    def _auxiliary(
        self,
        batch: dict[str, Tensor],
        prefix: Prefix,
        video: Tensor,
        audio: Tensor,
        probe: Tensor,
        times: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What each frame pair and sound token shows; and, after a few layers, what was seen then."""
        b = len(video)
        heard_at = prefix.audio_time.expand(b, -1)
        labels = render.labels(batch, times, heard_at)
        per_grid = video.unflatten(1, (times.shape[1] // 2, -1)).mean(2)
        losses = [
            F.cross_entropy(layer(per_grid).float().flatten(0, 1), labels["frame_" + name][:, 0::2].flatten())
            for name, layer in self.probes.frame.items()
        ]
        for layer, name in ((self.probes.word, "word"), (self.probes.sound, "sound")):
            losses.append(
                F.cross_entropy(layer(audio).float().flatten(0, 1), labels["audio_" + name].flatten())
            )
        event = ((labels["audio_word"] > 0) | (labels["audio_sound"] > 0)).float().flatten()
        at = probe[:, prefix.audio_slots]
        sync = torch.zeros((), device=self.device)
        for layer, name in ((self.probes.seen_shape, "shape"), (self.probes.seen_colour, "colour")):
            loss = F.cross_entropy(
                layer(at).float().flatten(0, 1), labels["audio_" + name].flatten(), reduction="none"
            )
            sync = sync + (loss * event).sum() / event.sum().clamp(min=1)
        return torch.stack(losses).sum(), sync

    def late_layers(self, clips: int, generator: torch.Generator, active: bool) -> Tensor:
        """(layers, B) bool: from a random layer on, most clips lose their audio-visual tokens."""
        rule = self.config["late_removal"]
        layers = self.config["geometry"]["text"]["num_hidden_layers"]
        first = torch.randint(rule["first"], rule["last"] + 1, (clips,), generator=generator)
        spared = torch.rand(clips, generator=generator) >= (rule["share"] if active else 0.0)
        first = torch.where(spared, layers + 1, first)
        return (torch.arange(1, layers + 1)[:, None] >= first).to(self.device)

    def step(
        self, out: Outputs, shares: tuple[float, float], *, encoder: float, sync: float, clip: float
    ) -> Tensor:
        """Backward pass and one step of the optimisers; returns the norm of the model's gradient.

        shares: learning rates of the model and of the probes, of their peaks; encoder, sync: weights of the
        auxiliary losses; clip: the largest norm of the model's gradient.
        """
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        (out.answer + encoder * out.encoder + sync * out.sync).backward()
        params = [p for p in self.thinker.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(params, clip)
        for optimiser, peaks in zip(self.optimisers, self.peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * shares[group.get("probes", False)]
            optimiser.step()
        return norm

    def size(self, seconds: float, clips: int) -> Size:
        """The shape of batches of this many clips."""
        return Size(seconds, clips, self.question_tokens(seconds))

    def batches(
        self, sizes: tuple[Size, ...], split: str, first: int, count: int
    ) -> Iterator[tuple[Size, dict[str, Tensor]]]:
        """`count` batches from number `first` on, on the device; sizes take turns."""
        config = self.config
        spec = PackingSpec(sizes, config["questions_per_clip"], split, config["seed"], first, count)
        suffix = [self.token_id[word] for word in ("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")]
        made = batches(spec, suffix, self.token_id["<|im_end|>"], config["workers"])
        for index, batch in enumerate(made, first):
            on_device = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            yield spec.size(index), on_device

    def evaluate(self, split: str, size: Size, clips: int, late: Sequence[int | None]) -> dict[str, Any]:
        """Share of questions answered exactly right, by family, for each late layer (None: never dropped).

        Teacher-forced: every answer token must be the most likely one given those before it. Gradients stay
        enabled, though unused: the compiled blocks are then those of training.
        """
        layers = self.config["geometry"]["text"]["num_hidden_layers"]
        right = torch.zeros(len(late), len(FAMILIES) + 1, device=self.device)
        asked = torch.zeros(len(FAMILIES) + 1, device=self.device)
        numbers = torch.arange(1, layers + 1, device=self.device)[:, None].expand(-1, size.clips)
        for _, batch in self.batches((size,), split, 0, -(-clips // size.clips)):
            family = batch["family"]
            valid = family >= 0
            asked += torch.bincount(family[valid], minlength=len(FAMILIES) + 1)
            for row, layer in enumerate(late):
                dropped = numbers >= (layers + 1 if layer is None else layer)
                with torch.autocast(self.device.type, torch.bfloat16):
                    out = self.run(batch, size.seconds, dropped, augment=False)
                right[row] += torch.bincount(family[valid & out.right], minlength=len(FAMILIES) + 1)
        result: dict[str, Any] = {}
        for row, layer in enumerate(late):
            shares = {
                name: round(float(right[row, i] / asked[i].clamp(min=1)), 4)
                for i, name in enumerate(FAMILIES)
            }
            result[str(layer)] = {"mean": round(sum(shares.values()) / len(shares), 4)} | shares
        return result

    def start_from(self, folder: Path) -> None:
        """Take the weights of a checkpoint folder; probes and optimisers stay fresh."""
        given = type(self.thinker).from_pretrained(folder, dtype=torch.float32)
        self.thinker.load_state_dict(given.state_dict())

    def save(self, path: Path, step: int) -> None:
        """Everything needed to go on from here."""
        optimisers = [o.state_dict() for o in self.optimisers]
        state = {"step": step, "thinker": self.thinker.state_dict(), "probes": self.probes.state_dict()}
        torch.save(state | {"optimisers": optimisers}, path)

    def load(self, path: Path) -> int:
        """Continue from a saved state; returns the step."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.thinker.load_state_dict(state["thinker"])
        self.probes.load_state_dict(state["probes"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        return int(state["step"])
