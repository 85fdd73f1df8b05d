"""From records to rows: accuracy, by family and in the mean, beside that of full tokens, and how sure it is.

accuracy   the mean over families of the share of questions answered right, so that a family counts the same
           however many questions it has
interval   95%, percentile bootstrap: clips (not questions, which share one) are drawn with replacement, 2000
           times from a fixed seed, and the same statistic is taken of each draw
% of full  accuracy / the accuracy of full tokens, on the questions that both answered, drawn in pairs
points     100 x (accuracy - that of the method compared against), in pairs likewise
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from seats_cli.errors import UsageError
from seats_cli.lab.records import Record, has_failed, is_unplanned
from seats_cli.lab.settings import FULL, PRESET, Setting, told

RESAMPLES = 2000
BLOCK = 100  # resamples at a time: bounds memory
LEVEL = (2.5, 97.5)  # percent

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95% interval; None where there is nothing to take it from, the ends also
    where there is a single clip."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Against:
    """How a row does against another method's, in points of accuracy, paired by clip.

    settings: what the other row was told, its preset among it; empty where nothing
    """

    method: str
    settings: Mapping[str, str]
    points: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """One setting of a sweep. Shares are fractions; None where nothing was answered.

    n, clips:      questions answered and the clips that they are about
    failed:        questions without an answer (an unreadable file, no memory); in no other number
    families:      share right of each family; `accuracy` is their mean
    overall:       share of all questions right, each counting the same
    wer:           mean word error rate of the transcriptions
    retention:     mean over layers of the share of video and audio tokens processed, as reached
    compute_ratio: prefill FLOPs by those of the whole prompt
    seconds:       a question, from the encoded clip to the end of the answer
    error:         why questions had no plan within this ratio (`unplanned` of them), else None
    """

    method: str
    ratio: float
    preset: str | None
    settings: Mapping[str, str]
    accuracy: float | None
    low: float | None
    high: float | None
    of_full: float | None
    of_full_low: float | None
    of_full_high: float | None
    against: Against | None
    n: int
    clips: int
    failed: int
    unplanned: int
    families: Mapping[str, float]
    overall: float | None
    wer: float | None
    retention: float | None
    compute_ratio: float | None
    seconds: float | None
    error: str | None

    @property
    def setting(self) -> Setting:
        """What was asked for."""
        return Setting(self.method, self.ratio, self.preset, tuple(sorted(self.settings.items())))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summarise(records: Mapping[Setting, Sequence[Record]], *, against: str = FULL) -> tuple[Row, ...]:
    """A row a setting, in the order given. `against`: the method that `Row.against` compares with, at the
    same ratio and in the same variant (see `base_of`)."""
    settings = tuple(records)
    answered = {
        setting: {record["id"]: record for record in found if record["error"] is None}
        for setting, found in records.items()
    }
    clips = tuple(dict.fromkeys(record["clip"] for found in records.values() for record in found))
    full = next((answered[setting] for setting in settings if setting.method == FULL), {})
    rows = []
    for setting, found in records.items():
        base = base_of(setting, settings, against)
        based = answered[base] if base is not None else {}
        rows.append(_row(setting, found, answered[setting], full, base, based, clips))
    return tuple(rows)


def base_of(setting: Setting, settings: Sequence[Setting], method: str) -> Setting | None:
    """The setting to compare with: `method` at the same ratio (`full` has but one) and in the same variant.

    The same variant is what its preset and settings come to for `method`, which may read fewer. Where
    that was not run, it is the only row that `method` has, or None: of several none is right. A row of
    `method` itself is compared with its own first variant; None for that one.
    """
    of_method = [s for s in settings if s.method == method and (method == FULL or s.ratio == setting.ratio)]
    if not of_method or setting == of_method[0]:
        return None
    if setting.method == method or len(of_method) == 1:
        return of_method[0]
    try:
        same = told(method, setting.ratio, setting.preset, dict(setting.settings))
    except UsageError:  # the preset's file is gone since
        return None
    return same if same in of_method else None


def _row(
    setting: Setting,
    found: Sequence[Record],
    mine: Mapping[str, Record],
    full: Mapping[str, Record],
    base: Setting | None,
    based: Mapping[str, Record],
    clips: Sequence[str],
) -> Row:
    answered = list(mine.values())
    accuracy = estimate(clips, [answered], lambda values: values[0])
    both = [sample for sample in mine if sample in full]
    of_full = estimate(clips, [[mine[i] for i in both], [full[i] for i in both]], _ratio)
    shared = [sample for sample in mine if sample in based]
    difference = estimate(clips, [[mine[i] for i in shared], [based[i] for i in shared]], _points)
    unplanned = [record for record in found if is_unplanned(record)]
    return Row(
        method=setting.method,
        ratio=setting.ratio,
        preset=setting.preset,
        settings=dict(setting.settings),
        accuracy=accuracy.value,
        low=accuracy.low,
        high=accuracy.high,
        of_full=of_full.value,
        of_full_low=of_full.low,
        of_full_high=of_full.high,
        against=None if base is None else Against(base.method, _variant(base), *_fields(difference)),
        n=len(answered),
        clips=len({record["clip"] for record in answered}),
        failed=sum(has_failed(record) for record in found),
        unplanned=len(unplanned),
        families=shares(answered),
        overall=_mean(float(record["correct"]) for record in answered),
        wer=_mean(record["wer"] for record in answered),
        retention=_mean(record["retention"] for record in answered),
        compute_ratio=_mean(record["compute_ratio"] for record in answered),
        seconds=_mean(record["prefill_s"] + record["generate_s"] for record in answered),
        error=unplanned[0]["error"]["message"] if unplanned else None,
    )


def shares(records: Iterable[Record]) -> dict[str, float]:
    """The share right of each family, in order of appearance."""
    tally: dict[str, list[bool]] = {}
    for record in records:
        tally.setdefault(record["family"], []).append(record["correct"])
    return {family: sum(right) / len(right) for family, right in tally.items()}


# ---- intervals --------------------------------------------------------------------------------------------


def estimate(
    clips: Sequence[str], groups: Sequence[Sequence[Record]], statistic: Callable[[list[Array]], Array]
) -> Estimate:
    """`statistic` of the groups' accuracies, with its bootstrap interval over `clips`.

    statistic: takes one array of accuracies a group, an element a draw, NaN where a draw has no question of
    the group. Groups see the same draws, so that what they share cancels out.
    """
    if not all(groups):
        return Estimate()
    tables = [_tally(clips, group) for group in groups]
    whole = statistic([_accuracy(np.ones((1, len(clips))), *table) for table in tables])
    value = _finite(whole[0])
    seen = {record["clip"] for group in groups for record in group}
    if value is None or len(seen) < 2:
        return Estimate(value)
    drawn = np.concatenate(
        [statistic([_accuracy(draw, *table) for table in tables]) for draw in draws(len(clips))]
    )
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Estimate(value)
    low, high = np.percentile(drawn, LEVEL)
    return Estimate(value, float(low), float(high))


def draws(n: int, seed: int = 0) -> Iterator[Array]:
    """Blocks of (BLOCK, n) counts: how often each of n clips is in each of RESAMPLES draws of n."""
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES // BLOCK):
        chosen = generator.integers(0, n, size=(BLOCK, n))
        flat = (chosen + n * np.arange(BLOCK)[:, None]).ravel()
        yield np.bincount(flat, minlength=BLOCK * n).reshape(BLOCK, n).astype(np.float64)


def _tally(clips: Sequence[str], records: Sequence[Record]) -> tuple[Array, Array]:
    """(clips, families) questions right, and asked."""
    row = {clip: index for index, clip in enumerate(clips)}
    column = {family: index for index, family in enumerate(dict.fromkeys(r["family"] for r in records))}
    right, asked = (np.zeros((len(row), len(column))) for _ in range(2))
    for record in records:
        place = row[record["clip"]], column[record["family"]]
        right[place] += record["correct"]
        asked[place] += 1
    return right, asked


def _accuracy(counts: Array, right: Array, asked: Array) -> Array:
    """(draws,) mean over the families that a draw has of their share right; NaN where it has none."""
    n_asked = counts @ asked
    share = np.divide(counts @ right, n_asked, out=np.zeros_like(n_asked), where=n_asked > 0)
    families = (n_asked > 0).sum(axis=1).astype(np.float64)
    return np.divide(share.sum(axis=1), families, out=np.full(len(families), np.nan), where=families > 0)


def _ratio(values: list[Array]) -> Array:
    mine, full = values
    return np.divide(mine, full, out=np.full(len(mine), np.nan), where=full > 0)


def _points(values: list[Array]) -> Array:
    mine, other = values
    difference: Array = 100 * (mine - other)
    return difference


def _variant(setting: Setting) -> dict[str, str]:
    preset = {} if setting.preset is None else {PRESET: setting.preset}
    return {**preset, **dict(setting.settings)}


def _fields(found: Estimate) -> tuple[float | None, float | None, float | None]:
    return found.value, found.low, found.high


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ---- documents --------------------------------------------------------------------------------------------


def as_csv(rows: Sequence[Row]) -> str:
    """A line a row under a line of names; a column a family ("family:text"), empty where there is none."""
    families = dict.fromkeys(family for row in rows for family in row.families)
    text = io.StringIO()
    writer: Any = None
    for row in rows:
        flat = row.to_json()
        shares_of = flat.pop("families")
        against = flat.pop("against") or {}
        flat["settings"] = _pairs(row.settings)
        against["settings"] = _pairs(against.get("settings", {}))
        flat |= {
            f"against_{key}": against.get(key) for key in ("method", "settings", "points", "low", "high")
        }
        flat |= {f"family:{family}": shares_of.get(family) for family in families}
        if writer is None:
            writer = csv.DictWriter(text, list(flat), lineterminator="\n")
            writer.writeheader()
        writer.writerow(flat)
    return text.getvalue()


def _pairs(settings: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())
