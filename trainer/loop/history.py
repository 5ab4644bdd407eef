"""What a weights file says of its training."""

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any

import vidt
from trainer.loop.clock import Clock
from trainer.readers.samples import SampleTable
from trainer.settings.config import PLACES, TrainConfig


def history(
    config: TrainConfig, train_set: SampleTable, val_set: SampleTable, clock: Clock, step: int
) -> dict[str, Any]:
    """Settings and data of a run that has done `step` steps; no path, since files are handed on."""
    settings = {name: value for name, value in asdict(config).items() if name not in PLACES}
    for name in ("pre_trained", "load_from", "distil_model_path"):
        if settings[name] is not None:
            settings[name] = PurePath(settings[name]).name
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
