"""What matching and the losses cost, without a model: `python benchmarks/criterion.py`.

Random predictions of a decoder's levels and random objects; each case is timed whole (losses and
their gradients) and in its parts. Medians, in milliseconds, of runs in turn: what disturbs the
machine for a while falls on all parts alike.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from vidt import SetCriterion

LEVELS, CLASSES = 7, 91  # the published decoder, and COCO's raw category ids
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """What is matched: `queries` of every level with `objects` in each of `images`."""

    queries: int
    images: int
    objects: int


@dataclass(frozen=True)
class Result:
    """Milliseconds, medians: the matrix of costs, all of the matching, all with gradients."""

    costs: float
    matching: float
    whole: float


def measure(case: Case, device: torch.device, repeat: int) -> Result:
    torch.manual_seed(0)
    outputs = random_outputs(case, device)
    targets = [random_objects(case.objects, device) for _ in range(case.images)]
    levels = [*outputs["aux_outputs"], outputs]
    logits, boxes = (
        torch.stack([level[name].detach() for level in levels])
        for name in ("pred_logits", "pred_boxes")
    )
    criterion = SetCriterion()

    def costs() -> None:
        with torch.no_grad():
            criterion.matcher.costs(logits, boxes, targets)

    def whole() -> None:
        terms = criterion(outputs, targets, case.images * case.objects)
        torch.stack(list(terms.values())).sum().backward()

    parts = (costs, lambda: criterion.match(outputs, targets), whole)
    return Result(*medians(parts, repeat, device))


def random_outputs(case: Case, device: torch.device) -> dict:
    levels = [
        {
            "pred_logits": torch.randn(case.images, case.queries, CLASSES, device=device) - 4,
            "pred_boxes": random_boxes(case.images, case.queries, device=device),
        }
        for _ in range(LEVELS)
    ]
    for level in levels:
        for prediction in level.values():
            prediction.requires_grad_()
    return {**levels[-1], "aux_outputs": levels[:-1]}


def random_objects(count: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "labels": torch.randint(CLASSES, (count,), device=device),
        "boxes": random_boxes(count, device=device),
    }


def random_boxes(*shape: int, device: torch.device) -> Tensor:
    """[*shape, 4], cxcywh inside 0..1."""
    sides = torch.rand(*shape, 2, device=device) * 0.4 + 0.02
    centres = sides / 2 + torch.rand(*shape, 2, device=device) * (1 - sides)
    return torch.cat([centres, sides], dim=-1)


def medians(
    parts: tuple[Callable[[], object], ...], repeat: int, device: torch.device
) -> list[float]:
    """Milliseconds of each part, with nothing left to do on the device."""
    seconds: list[list[float]] = [[] for _ in parts]
    for _ in range(WARM_UP + repeat):
        for part, taken in zip(parts, seconds, strict=True):
            start = time.perf_counter()
            part()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken[WARM_UP:]) for taken in seconds]


def main() -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Time of matching and losses.")
    parser.add_argument("--queries", nargs="+", type=int, default=[100, 300])
    parser.add_argument("--images", nargs="+", type=int, default=[2, 16])
    parser.add_argument("--objects", nargs="+", type=int, default=[10, 60], help="in each image")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default=here)
    parser.add_argument("--repeat", type=int, default=10, help="runs that are counted")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{'queries':>7} {'images':>6} {'objects':>7} ", end="")
    print(f"{'costs ms':>9} {'matching':>9} {'whole':>9}")
    results = []
    for case in (Case(*sizes) for sizes in product(given.queries, given.images, given.objects)):
        result = measure(case, torch.device(given.device), given.repeat)
        print(f"{case.queries:>7} {case.images:>6} {case.objects:>7} ", end="")
        print(f"{result.costs:>9.2f} {result.matching:>9.2f} {result.whole:>9.2f}", flush=True)
        results.append(asdict(case) | asdict(result))
    if given.json is not None:
        where = {"torch": torch.__version__, "device": given.device, "threads": given.threads}
        given.json.write_text(json.dumps({"environment": where, "results": results}, indent=1))


if __name__ == "__main__":
    main()
