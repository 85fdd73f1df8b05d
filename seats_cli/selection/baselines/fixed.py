"""The uniform schedule: stage I's choice and nothing inside the LLM."""

from seats_cli.presets import Preset
from seats_cli.selection.contract import Kept, MediaTokens, Method, by_windows
from seats_cli.selection.diversity import choose_diverse
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan
from seats_cli.selection.planning import flat_plan


class Fixed(Method):
    """Stage I's diversity alone, at the mean ratio: one keep ratio for all layers, none inside the LLM."""

    name = "fixed"
    summary = "stage I's choice alone, at one ratio for all layers"
    source = "the uniform schedule that arXiv 2605.20035 compares with"
    needs_saliency = True

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        return flat_plan(self.name, preset, ratio, counts, options, needs_saliency=True)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        return by_windows(
            tokens,
            plan,
            lambda embeddings, saliency, _, n_keep: choose_diverse(embeddings, saliency, n_keep),
            merge=plan.options.merge,
        )
