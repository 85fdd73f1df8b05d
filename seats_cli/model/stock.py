"""The stock transformers path on one prompt, as its users run it: what our own is compared with.

Nothing here belongs to our engine. The network's own encoders, forward and `generate` run as published, on
tensors that lie on the device already, so that no file or processor is timed. Run it before anything alters
the network for speed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from seats_cli.model.adapter import Adapter, MediaShape, Prompt
from seats_cli.model.preprocess import patchify
from seats_cli.model.weights import quiet_transformers
from seats_cli.selection.layout import AUDIO, VIDEO


class StockRun:
    """One prompt about one clip, ready for the stock model.

    inputs: what `forward` and `generate` take, on the device, as the family's processor would make it
    """

    def __init__(
        self,
        adapter: Adapter,
        prompt: Prompt,
        shape: MediaShape,
        *,
        frames: torch.Tensor | None = None,
        mel: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
    ) -> None:
        """`frames` (T, H, W, 3) and `image` (1, H, W, 3) uint8 at their grid's size; `mel` (bins, L) float32;
        None for what the clip lacks."""
        self._network, self._device = adapter.network, adapter.device
        self._layout, self._image_slots = prompt.layout, prompt.image_slots
        self._shape = shape
        self._deepstack: dict[str, Any] = {}  # of the last clip encoded
        geometry = adapter.geometry
        dtype = adapter.dtype

        def patches(pixels: torch.Tensor) -> torch.Tensor:
            return patchify(
                pixels.to(self._device),
                adapter.pixel_stats,
                patch=geometry.patch,
                temporal_patch=geometry.temporal_patch,
                merge=geometry.merge,
            ).to(dtype)

        ids = prompt.input_ids[None].to(self._device)
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if frames is not None:
            self.inputs |= {
                "pixel_values_videos": patches(frames),
                "video_grid_thw": torch.tensor([shape.video_grid], device=self._device),
                "video_second_per_grid": torch.tensor([shape.seconds_per_grid], device=self._device),
                "use_audio_in_video": mel is not None,
            }
        if image is not None:
            self.inputs |= {
                "pixel_values": patches(image),
                "image_grid_thw": torch.tensor([shape.image_grid], device=self._device),
            }
        if mel is not None:
            self.inputs |= {
                "input_features": mel[None].to(self._device, dtype),
                "feature_attention_mask": torch.ones(1, mel.shape[1], dtype=torch.int64, device=self._device),
            }

    def encode_video(self) -> torch.Tensor | None:
        """(n_video, D) by `get_video_features`; for a picture (n_image, D); None without either.

        `prefill` is given the deepstack features among them, where the family has them."""
        if "pixel_values_videos" in self.inputs:
            kind, output = (
                "video",
                self._network.get_video_features(
                    self.inputs["pixel_values_videos"], self.inputs["video_grid_thw"]
                ),
            )
        elif "pixel_values" in self.inputs:
            kind, output = (
                "image",
                self._network.get_image_features(self.inputs["pixel_values"], self.inputs["image_grid_thw"]),
            )
        else:
            return None
        if getattr(output, "deepstack_features", None):
            self._deepstack = {"mm_encoder_outputs": {kind: output}}
        return _features(output)

    def encode_audio(self) -> torch.Tensor | None:
        """(n_audio, D) by `get_audio_features`; None without sound."""
        if "input_features" not in self.inputs:
            return None
        return _features(
            self._network.get_audio_features(
                self.inputs["input_features"], feature_attention_mask=self.inputs["feature_attention_mask"]
            )
        )

    def embed(self, seen: torch.Tensor | None, heard: torch.Tensor | None) -> torch.Tensor:
        """(1, S, D): the prompt's embeddings with what the encoders gave in its places."""
        embeddings = self._network.get_input_embeddings()(self.inputs["input_ids"]).clone()
        kind = self._layout.kind
        places = self._image_slots if self._shape.n_image else (kind == VIDEO).nonzero().squeeze(1)
        for slots, rows in ((places, seen), ((kind == AUDIO).nonzero().squeeze(1), heard)):
            if rows is not None:
                embeddings[0, slots.to(self._device)] = rows.to(embeddings)
        return embeddings

    def prefill(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(V,) float32 logits of the last position; the stock forward computes those of all positions.

        It also computes the prompt's rotary positions, as in `generate`."""
        encoded = ("pixel_values_videos", "pixel_values", "input_features")
        given = {name: value for name, value in self.inputs.items() if name not in encoded}
        given |= self._deepstack
        logits = self._network(**given, inputs_embeds=embeddings, use_cache=True).logits
        return logits[0, -1].float()

    def generate(self, n_tokens: int, on_token: Callable[[int], None]) -> list[int]:
        """`generate` on everything, its encoders included: exactly `n_tokens`, greedy, end tokens put off.

        `on_token(k)` is called when the k-th token's logits have been asked of the device, the first being 0.
        """
        with quiet_transformers():
            ids = self._network.generate(
                **self.inputs,
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                do_sample=False,
                use_cache=True,
                logits_processor=[_Steps(on_token)],
            )
        found: list[int] = ids[0, self.inputs["input_ids"].shape[1] :].tolist()
        return found


class _Steps:
    """A logits processor that changes nothing and tells of each step."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._done = on_token, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._on_token(self._done)
        self._done += 1
        return scores


def _features(output: Any) -> torch.Tensor:
    """The embeddings in what an encoder gave: a tensor, a piece a clip, or an output object, by release."""
    for name in ("pooler_output", "last_hidden_state"):
        found = getattr(output, name, None)
        if found is not None:
            output = found
            break
    if isinstance(output, torch.Tensor):
        return output
    pieces: Sequence[torch.Tensor] = output
    return torch.cat(list(pieces))
