"""A rank of a training task that knows the tiny backbones of `tiny_runs`.

The second process raises the error that FAULT names, if it is set.
"""

import os
from typing import Any

import torch
from tiny_runs import swapped

from vidt.model.vidt import ViDT
from ymir_adapter.launch import run_rank
from ymir_adapter.tasks.training import train_task

FAULTS = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "unforeseen": KeyError("nobody thought of this"),
}


def broken(self: ViDT, *images: Any, **more: Any) -> None:
    raise FAULTS[os.environ["FAULT"]]


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and "FAULT" in os.environ:
        with swapped(ViDT, "forward", broken):
            run_rank(train_task)
    else:
        run_rank(train_task)
