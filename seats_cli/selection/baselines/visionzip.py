"""VisionZip: the tokens that the encoder attends to, and averages of the others.

Source: arXiv 2412.04467; docs/method.md, "Baselines".
"""

from typing import ClassVar

import torch

from seats_cli.presets import Preset
from seats_cli.selection.baselines.shared import thin_evenly
from seats_cli.selection.contract import Kept, MediaTokens, Method, by_windows, keep_everything
from seats_cli.selection.diversity import merge_dropped
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Kind, Plan
from seats_cli.selection.planning import flat_plan

CONTEXTUAL_SHARE = 10 / 64  # published: of 64 tokens 54 are dominant and 10 contextual; 27 to 5 throughout


class VisionZip(Method):
    """Video: dominant and contextual tokens of each stage-I window; audio thinned evenly.

    `kinds` are those that the published rule chooses among.
    """

    name = "visionzip"
    summary = "video tokens that the encoder attends to, and averages of the others; audio evenly in time"
    source = "VisionZip, arXiv 2412.04467"
    needs_saliency = True
    kinds: ClassVar[tuple[Kind, ...]] = ("video",)

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        return flat_plan(self.name, preset, ratio, counts, options, needs_saliency=True)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        if plan.entry(tokens.kind) == 1.0:
            return keep_everything(tokens)
        if tokens.kind not in self.kinds:
            return thin_evenly(tokens, plan)
        made: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each batch of windows: indices, embeddings

        def choose(
            embeddings: torch.Tensor, saliency: torch.Tensor | None, indices: torch.Tensor, n_keep: int
        ) -> torch.Tensor:
            if saliency is None:
                raise ValueError(f"{self.name} needs the encoder's saliency")
            keep, values = zip_windows(embeddings, saliency, n_keep)
            made.append((indices.gather(1, keep).flatten(), values.flatten(0, 1)))
            return keep

        kept = by_windows(tokens, plan, choose)
        embeddings = kept.embeddings.clone()
        for indices, values in made:
            embeddings[torch.searchsorted(kept.indices, indices)] = values
        return Kept(kept.indices, embeddings)


class VisionZipOm(VisionZip):
    """The same rule for video and audio, each with its own budget."""

    name = "visionzip-om"
    summary = "tokens that the encoders attend to, and averages of the others, video and audio alike"
    source = "VisionZip, arXiv 2412.04467, carried over to audio"
    kinds: ClassVar[tuple[Kind, ...]] = ("video", "audio")


def zip_windows(
    embeddings: torch.Tensor, saliency: torch.Tensor, n_keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `n_keep` tokens that stand for each window's N, and what they become.

    embeddings: (B, N, D) any float dtype; saliency: (B, N) float32. Returns (B, n_keep) int64, each row
    ascending, and (B, n_keep, D): dominant tokens as they were, contextual ones as averages. Ties go to the
    lowest index.
    """
    n_windows, _, width = embeddings.shape
    n_contextual = round(CONTEXTUAL_SHARE * n_keep)
    order = saliency.argsort(dim=1, descending=True, stable=True)
    dominant, rest = order[:, : n_keep - n_contextual], order[:, n_keep - n_contextual :].sort(dim=1).values

    def at(indices: torch.Tensor) -> torch.Tensor:
        return embeddings.gather(1, indices[:, :, None].expand(-1, -1, width))

    keep, values = dominant, at(dominant)
    if n_contextual:
        spaced = torch.arange(n_contextual, device=rest.device) * rest.shape[1] // n_contextual
        targets = spaced.expand(n_windows, -1)
        keep = torch.cat((keep, rest.gather(1, targets)), dim=1)
        values = torch.cat((values, merge_dropped(at(rest), targets)), dim=1)
    keep, by_place = keep.sort(dim=1)
    return keep, values.gather(1, by_place[:, :, None].expand(-1, -1, width))
