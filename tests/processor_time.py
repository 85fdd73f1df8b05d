"""What a command costs to start."""

import resource
import subprocess
from collections.abc import Sequence


def least_seconds(command: Sequence[str], *, returns: int = 0, times: int = 3) -> float:
    """Processor seconds of a command, the best of `times`: wall time on a busy machine says little, and what
    disturbs a run only ever adds to it. Fails if the command ends with another code than `returns`."""
    spent = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == returns, done.stderr
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)
