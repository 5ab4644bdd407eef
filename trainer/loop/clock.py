"""The length of a run in optimiser steps and in work, what is due after a step, and the record of
the run in a weights file.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import vidt
from trainer.readers.samples import SampleTable
from trainer.settings.config import TrainConfig
from trainer.settings.limits import PATHS

TRAIN_WORK = 3  # training on an image costs as much as evaluating three; for the progress bar


@dataclass(frozen=True)
class Clock:
    """The length of a run in optimiser steps and in work, the unit of its progress."""

    per_epoch: int
    total_steps: int
    step_images: int
    val_images: int
    eval_interval: int

    def epoch(self, step: int) -> int:
        """The epoch that the last of `step` steps belongs to, from 0."""
        return max(step - 1, 0) // self.per_epoch

    def epoch_or_run_ends(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with this many steps."""
        return step > 0 and (step % self.per_epoch == 0 or step == self.total_steps)

    def evaluation_due(self, step: int) -> bool:
        """Every `eval_interval` epochs, and at the end."""
        every = self.per_epoch * self.eval_interval
        return step > 0 and (step % every == 0 or step == self.total_steps)

    def save_due(self, step: int, config: TrainConfig) -> bool:
        """Every `save_interval` epochs and every `save_steps` steps."""
        whole_epochs = (
            self.epoch_or_run_ends(step) and step // self.per_epoch % config.save_interval == 0
        )
        return whole_epochs or (
            config.save_steps > 0 and step > 0 and step % config.save_steps == 0
        )

    def pause_due(self, step: int, config: TrainConfig) -> bool:
        """Whether anything will be written: the losses are checked before that."""
        return (
            self.epoch_or_run_ends(step) or self.evaluation_due(step) or self.save_due(step, config)
        )

    def fraction(self, step: int, evaluating: float = 0.0) -> float:
        """Share of the run's work done after `step` steps and the part `evaluating` (0..1) of the
        evaluation that follows them.
        """
        every = self.per_epoch * self.eval_interval
        evaluations = max(step - 1, 0) // every + evaluating
        work = step * self.step_images * TRAIN_WORK + evaluations * self.val_images
        all_evaluations = -(-self.total_steps // every)
        total = self.total_steps * self.step_images * TRAIN_WORK + all_evaluations * self.val_images
        return min(work / total, 1.0)


def without_addresses(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the bare names of weights files: the query of a URL may hold a secret."""
    names = ("pre_trained", "load_from", "distil_model_path")
    bare = {
        name: PurePath(urlsplit(settings[name]).path).name
        for name in names
        if settings.get(name) is not None
    }
    return {**settings, **bare}


def training_record(
    config: TrainConfig, train_set: SampleTable, val_set: SampleTable, clock: Clock, step: int
) -> dict[str, Any]:
    """Settings and data of a run after `step` steps, for the header of its weights. It holds no
    folders, since people pass weights files on.
    """
    own = {name: value for name, value in asdict(config).items() if name not in PATHS}
    settings = without_addresses(own)
    return {
        "version": vidt.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "epochs_done": round(step / clock.per_epoch, 2),
        "steps_done": step,
        "images_per_step": clock.step_images,
        "data": {
            name: {"source": table.source, "images": len(table), "boxes": len(table.labels)}
            for name, table in (("training", train_set), ("validation", val_set))
        },
        "category_ids": list(train_set.category_ids),
        "settings": settings,
    }
