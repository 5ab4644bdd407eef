"""Measured runs as rows and tables: medians, ratios to the floor, fractions of the limit."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ceiling import Ceiling
from contestants import FLOOR_FORWARD, FLOOR_LEARNING, FORWARD, LEARNING, TRAINING, UPDATE
from laps import Gains, medians

Name = tuple[str, str]  # work, how
# What each kind of work is divided by: the eager floor of the same round.
FLOORS = {
    FLOOR_FORWARD: FLOOR_FORWARD,
    FORWARD: FLOOR_FORWARD,
    FLOOR_LEARNING: FLOOR_LEARNING,
    LEARNING: FLOOR_LEARNING,
    TRAINING: FLOOR_LEARNING,
}
WORKS = list(FLOORS)  # in the order of the table
# How often a part reads or writes a number for each parameter: nothing else limits it.
PASSES = {"clip": 3, "optimiser": 7, "EMA": 3}

SPLIT = {"forward": "forward: other", "backward": "backward: other"}  # of which parts are named


@dataclass(frozen=True)
class Row:
    """Seconds of one kind of work in each round, and what they are divided by; `of_limit` is the
    time that its FLOPs need at the ceiling relative to the median. None: not measured.
    """

    work: str
    how: str
    seconds: list[float]
    ratios: list[float]
    images_per_second: float
    flops: float | None
    of_limit: float | None
    memory_gib: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        spread = {"fastest": min(self.seconds), "slowest": max(self.seconds)}
        ratio = {
            "median": statistics.median(self.ratios),
            "least": min(self.ratios),
            "most": max(self.ratios),
        }
        return asdict(self) | {"median": self.median, **spread, "ratio": ratio}

    def __str__(self) -> str:
        """A line below HEADING."""
        seconds, ratios = self.seconds, self.ratios
        return (
            f"{self.work:<15}{self.how:<9}{self.median:>9.4f}"
            f"{f'{min(seconds):.4f}-{max(seconds):.4f}':>17}{self.images_per_second:>10.2f}"
            f"{statistics.median(ratios):>9.3f}{f'{min(ratios):.3f}-{max(ratios):.3f}':>14}"
            f"{_shown(self.flops, 1e-9, '.1f'):>9}{_shown(self.of_limit, 100, '.0f'):>7}"
            f"{_shown(self.memory_gib, 1, '.2f'):>7}"
        )


HEADING = (
    f"{'work':<15}{'how':<9}{'median s':>9}{'fastest-slowest':>17}{'images/s':>10}"
    f"{'to timm':>9}{'of each round':>14}{'GFLOP':>9}{'limit%':>7}{'GiB':>7}"
)


@dataclass(frozen=True)
class Part:
    """Seconds of one part in the median round, its share of the whole and its FLOPs; `of_limit` as
    of a row, for what only touches the parameters against the copy bandwidth.
    """

    part: str
    seconds: float
    share: float
    flops: float
    of_limit: float | None


def make_rows(
    rounds: dict[Name, list[Gains]],
    flops: dict[str, Gains],
    peaks: dict[str, float],
    ceiling: Ceiling,
    num_images: int,
) -> list[Row]:
    """rounds by contestant and flops by its work, both by part; peaks in GiB by work."""
    seconds = dict(_works(rounds.items()))
    counts = {work: count[0] for (work, _), count in _works(_each_once(flops))}
    rows = []
    for (work, how), times in seconds.items():
        floor = seconds[FLOORS[work], "eager"]
        median, count = statistics.median(times), counts.get(work)
        rows.append(
            Row(
                work,
                how,
                times,
                [time / least for time, least in zip(times, floor, strict=True)],
                num_images / median,
                count,
                None if count is None else count / ceiling.flops / median,
                peaks.get(work) if how == "eager" else None,
            )
        )
    return sorted(rows, key=lambda row: WORKS.index(row.work))


def _each_once(flops: dict[str, Gains]) -> Iterable[tuple[Name, list[Gains]]]:
    return (((work, "eager"), [gains]) for work, gains in flops.items())


def _works(rounds: Iterable[tuple[Name, list[Gains]]]) -> Iterable[tuple[Name, list[float]]]:
    """What each contestant gained in each round; a training step has its learning told as well."""
    for (work, how), gains in rounds:
        if work == TRAINING:
            yield (LEARNING, how), [_total(each, without=UPDATE) for each in gains]
        yield (work, how), [_total(each) for each in gains]


def _total(gains: Gains, without: Sequence[str] = ()) -> float:
    return sum(gain for part, gain in gains.items() if part not in without)


def make_parts(
    rounds: Sequence[Gains], flops: Gains, ceiling: Ceiling, num_parameters: int
) -> list[Part]:
    seconds = medians(rounds)
    whole = sum(seconds.values())
    parts = []
    for part, time in seconds.items():
        count = flops.get(part, 0.0)
        needed = count / ceiling.flops or 4 * num_parameters * PASSES.get(part, 0) / ceiling.bytes
        parts.append(Part(part, time, time / whole, count, needed / time if needed else None))
    return parts


def parts_table(forward: list[Part], step: list[Part]) -> list[str]:
    """Lines: the parts of a forward pass beside those of a training step."""
    titles = f"{'s':>9}{'share%':>8}{'GFLOP':>9}{'limit%':>8}"
    lines = [f"{'part':<16}{FORWARD:>34} |{TRAINING:>34}", f"{'':<16}{titles} |{titles}"]
    known = [{part.part: part for part in parts} for parts in (forward, step)]
    for name in dict.fromkeys([*known[1], *known[0]]):
        cells = [_part_cells(parts.get(name)) for parts in known]
        lines.append(f"{SPLIT.get(name, name):<16}{' |'.join(cells)}".rstrip())
    return lines


def _part_cells(part: Part | None) -> str:
    if part is None:
        return " " * 34
    limit, flops = _shown(part.of_limit, 100, ".0f"), _shown(part.flops or None, 1e-9, ".1f")
    return f"{part.seconds:>9.4f}{100 * part.share:>8.1f}{flops:>9}{limit:>8}"


def _shown(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(scale * value, form)
