"""Loss terms between two looks at them: means for the report, and the guard against NaN."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.loop.agreement import Agreement
from vidt.atomic import atomic_write

NORM = "grad_norm"


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; nothing was saved since."""


class LossLog:
    """Loss terms and gradient norms of the steps since the last look. They stay on the device until
    then: no wait at every step.
    """

    def __init__(self, agreement: Agreement, output: Path, *, step_images: int) -> None:
        self.agreement, self.output, self.step_images = agreement, output, step_images
        self.since = time.monotonic()
        self.pending: list[tuple[int, dict[str, Tensor], list[int]]] = []

    def add(self, step: int, terms: dict[str, Tensor], norm: Tensor, image_ids: list[int]) -> None:
        """norm is that of the gradient over all processes, 0 where the weights did not move."""
        self.pending.append((step, {**terms, NORM: norm}, image_ids))

    def check(self) -> dict[str, float]:
        """Means over the steps since the last call, summed over processes, with speed and memory.

        Raises NonFiniteLoss on every process if any of them met one, after writing
        `non_finite.json`.
        """
        if not self.pending:
            return {}
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack(list(terms.values())) for _, terms, _ in self.pending])
        values = values.cpu().double()  # [steps, terms and the norm]; the one wait
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

    def _refuse_non_finite(self, names: list[str], values: Tensor) -> None:
        bad_rows = (~values.isfinite()).any(1).nonzero().flatten().tolist()
        finding = None
        if bad_rows:
            step, _, image_ids = self.pending[bad_rows[0]]
            terms = dict(zip(names, values[bad_rows[0]].tolist(), strict=True))
            finding = {"step": step, "terms": terms, "image_ids": image_ids}
        findings = [found for found in self.agreement.gather_objects(finding) if found is not None]
        if not findings:
            return
        path = self.output / "non_finite.json"
        if self.agreement.is_main:
            atomic_write(path, json.dumps(findings, indent=1).encode())
        self.agreement.any(False)  # it is there before a process ends, by which others are ended
        raise NonFiniteLoss(_message(findings, path))


def _message(findings: list[dict[str, Any]], path: Path) -> str:
    """Names the first such step, and the images of the processes whose loss it was: the gradient,
    being a sum, is not finite on any of them.
    """
    step = min(found["step"] for found in findings)
    first = [found for found in findings if found["step"] == step]
    own = [found for found in first if any(name != NORM for name in _bad_terms(found))]
    blamed = own or first
    bad = [f"{name} {blamed[0]['terms'][name]}" for name in _bad_terms(blamed[0])]
    images = [image_id for found in blamed for image_id in found["image_ids"]]
    return (
        f"the loss is not finite at step {step}: {', '.join(bad)}; images {images} "
        f"(more in {path}); the weights on disk are from before. "
        "Try a lower --lr, or --clip_max_norm if it is 0"
    )


def _bad_terms(finding: dict[str, Any]) -> list[str]:
    return [name for name, term in finding["terms"].items() if not math.isfinite(term)]


def memory_gib() -> float:
    """Most memory used so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
