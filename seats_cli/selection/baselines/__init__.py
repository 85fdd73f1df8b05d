"""Methods to compare with, one small file each; their formulas stand in docs/method.md, "Baselines".

Each meets the same total as SEATS, with the same split between video and audio, so that they differ in what
they choose and where, not in how much.
"""

from seats_cli.selection.baselines.divprune import DivPrune, DivPruneOm
from seats_cli.selection.baselines.dycoke import DyCoke
from seats_cli.selection.baselines.fastv import FastV, FastVOm
from seats_cli.selection.baselines.fixed import Fixed
from seats_cli.selection.baselines.full import Full
from seats_cli.selection.baselines.omnizip import OmniZip
from seats_cli.selection.baselines.random_draw import Random
from seats_cli.selection.baselines.visionzip import VisionZip, VisionZipOm

__all__ = [
    "DivPrune",
    "DivPruneOm",
    "DyCoke",
    "FastV",
    "FastVOm",
    "Fixed",
    "Full",
    "OmniZip",
    "Random",
    "VisionZip",
    "VisionZipOm",
]
