"""Loss terms of the steps since the last report: their means, and the check for NaN."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.loop.agreement import Agreement
from trainer.loop.resume import NON_FINITE
from vidt.atomic import atomic_write

NORM = "grad_norm"


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; nothing has been saved since."""


class LossLog:
    """Loss terms and gradient norms of the steps since the last check. Until then they stay on the
    device, so that steps do not wait for them.
    """

    def __init__(self, agreement: Agreement, output: Path, *, step_images: int) -> None:
        self.agreement, self.output, self.step_images = agreement, output, step_images
        self.since = time.monotonic()
        self.pending: list[tuple[int, dict[str, Tensor], list[int]]] = []

    def add(self, step: int, terms: dict[str, Tensor], norm: Tensor, image_ids: list[int]) -> None:
        """norm: of the gradient over all processes; 0 if the step did not change the weights."""
        self.pending.append((step, {**terms, NORM: norm}, image_ids))

    def check(self) -> dict[str, float]:
        """Mean loss terms since the last call, summed over processes; the last step's gradient
        norm; speed and memory.

        If any process met a loss that is not finite, writes `non_finite.json` and raises
        NonFiniteLoss on every process.
        """
        if not self.pending:
            return {}
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack(list(terms.values())) for _, terms, _ in self.pending])
        values = values.cpu().double()  # [steps, terms and norm]; waits for the device
        self._refuse_non_finite(names, values)
        means = self.agreement.gather(*values[:, :-1].mean(0).tolist()).sum(0).tolist()
        now = time.monotonic()
        metrics = {"loss": sum(means), **dict(zip(names[:-1], means, strict=True))}
        metrics[NORM] = float(values[-1, -1])
        metrics["images_per_second"] = (
            len(self.pending) * self.step_images / max(now - self.since, 1e-9)
        )
        metrics["memory_gib"] = memory_gib()
        self.pending, self.since = [], now
        return metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block, such as that of an evaluation, does not count as training."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start

    def _refuse_non_finite(self, names: list[str], values: Tensor) -> None:
        bad_rows = (~values.isfinite()).any(1).nonzero().flatten().tolist()
        finding = None
        if bad_rows:
            step, _, image_ids = self.pending[bad_rows[0]]
            terms = dict(zip(names, values[bad_rows[0]].tolist(), strict=True))
            finding = {"step": step, "terms": terms, "image_ids": image_ids}
        findings = [each for each in self.agreement.gather_objects(finding) if each is not None]
        if not findings:
            return
        path = self.output / NON_FINITE
        if self.agreement.is_main:
            atomic_write(path, json.dumps(findings, indent=1).encode())
        self.agreement.gather(0)  # wait for the file: the first process to end ends the others
        raise NonFiniteLoss(_message(findings, path))


def _message(findings: list[dict[str, Any]], path: Path) -> str:
    """Names the first such step and the images of the processes with a bad loss. The gradient norm
    cannot identify a process: it is of the sum over processes, so it is bad on all of them.
    """
    step = min(each["step"] for each in findings)
    first = [each for each in findings if each["step"] == step]
    own = [each for each in first if any(name != NORM for name in _bad_terms(each))]
    blamed = own or first
    bad = [f"{name} {blamed[0]['terms'][name]}" for name in _bad_terms(blamed[0])]
    images = [image_id for each in blamed for image_id in each["image_ids"]]
    return (
        f"the loss is not finite at step {step}: {', '.join(bad)}; images {images} "
        f"(more in {path}); the saved weights are older than that. "
        "Try a lower --lr, or --clip_max_norm if it is 0"
    )


def _bad_terms(finding: dict[str, Any]) -> list[str]:
    return [name for name, term in finding["terms"].items() if not math.isfinite(term)]


def memory_gib() -> float:
    """Peak memory in GiB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
