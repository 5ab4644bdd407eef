"""Loss terms between two looks at them: means for the report, and the guard against NaN."""

import json
import math
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from trainer.agreement import Agreement
from trainer.report import write_whole


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nothing was saved since."""


class LossLog:
    """Loss terms of the steps since the last look. They stay on the device until then: no wait at
    every step.
    """

    def __init__(self, agreement: Agreement, output: Path, *, step_images: int) -> None:
        self.agreement, self.output, self.step_images = agreement, output, step_images
        self.since = time.monotonic()
        self.pending: list[tuple[int, dict[str, Tensor], list[int]]] = []
        self.norm = torch.zeros(())

    def add(self, step: int, terms: dict[str, Tensor], norm: Tensor, image_ids: list[int]) -> None:
        self.pending.append((step, terms, image_ids))
        self.norm = norm

    def check(self) -> dict[str, float]:
        """Means over the steps since the last call, summed over processes, with speed and memory.

        Raises NonFiniteLoss on every process if any of them met one, after writing
        `non_finite.json`.
        """
        if not self.pending:
            return {}
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack(list(terms.values())) for _, terms, _ in self.pending])
        values = values.double().cpu()  # [steps, terms]; the one wait
        self._refuse_non_finite(names, values)
        means = self.agreement.gather(*values.mean(0).tolist()).sum(0).tolist()
        now = time.monotonic()
        metrics = {"loss": sum(means), **dict(zip(names, means, strict=True))}
        metrics["grad_norm"] = float(self.norm)
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
        first = min(findings, key=lambda found: found["step"])
        path = self.output / "non_finite.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(findings, indent=1).encode())  # every process writes the same
        bad = [f"{name} {term}" for name, term in first["terms"].items() if not math.isfinite(term)]
        raise NonFiniteLoss(
            f"the loss is not finite at step {first['step']}: {', '.join(bad)}; images "
            f"{first['image_ids']} (more in {path}); the weights on disk are from before. "
            "Try a lower --lr, or --clip_max_norm if it is 0"
        )


def memory_gib() -> float:
    """Most memory used so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
