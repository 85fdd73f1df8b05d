"""Nothing is dropped: what every other method is measured against."""

from seats_cli.presets import Preset
from seats_cli.selection.contract import Method
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan
from seats_cli.selection.planning import check_ratio, full_plan


class Full(Method):
    """Every token in every layer, whatever the ratio: the stock model."""

    name = "full"
    summary = "every token in every layer: the stock model"
    source = "the checkpoint itself"

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        check_ratio(ratio)
        return full_plan(self.name, preset, counts, options)
