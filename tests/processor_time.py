"""What a command costs to start."""

import resource
import subprocess
import sys
from collections.abc import Sequence

INSTANT_S = 0.5  # on a machine that starts the yardstick in YARDSTICK_S
YARDSTICK_S = 0.2
YARDSTICK = [sys.executable, "-c", "import typer.main, rich.table, pydantic.types, yaml"]  # as any command


def is_instant(command: Sequence[str], *, returns: int = 0) -> bool:
    """Whether a command's processor time is below `INSTANT_S`, as long as it takes to look like that.

    Wall time on a busy machine says little. Processor time grows there too, so that on a slower one the bound
    is that many times the yardstick's, which is timed in turns with the command; what disturbs a run only
    ever adds to it, so the least of several counts. Fails if the command ends with another code than
    `returns`.
    """
    spent = yardstick = float("inf")
    for _ in range(5):
        spent = min(spent, _seconds(command, returns))
        if spent < INSTANT_S:
            return True
        yardstick = min(yardstick, _seconds(YARDSTICK, 0))
    return spent < INSTANT_S * max(1.0, yardstick / YARDSTICK_S)


def _seconds(command: Sequence[str], returns: int) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == returns, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
