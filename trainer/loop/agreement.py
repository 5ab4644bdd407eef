"""Agreement between the processes of a run, over a gloo group on the CPU.

Such a group does not wait for queued device work, and has no limit of 600 s while the main process
scores or reads. With one process nothing is exchanged.
"""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from vidt.errors import UserError

PATIENCE = timedelta(hours=12)  # a dead process is noticed at once, by its closed connection
# For collectives on the devices, of which all processes agree to make the next one: only a GPU or a
# link that hangs takes long, and nothing else notices that. Compiling a step can take minutes.
DEVICE_PATIENCE = timedelta(minutes=30)


class Agreement:
    """Collectives on numbers and objects. Every process must make every call, in the same order."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.num_processes = accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.group: Any = None
        if self.num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, *numbers: float) -> Tensor:
        """Each process's numbers: [processes, len(numbers)] float64, the same on all."""
        row = torch.tensor([numbers], dtype=torch.float64)
        if self.group is None:
            return row
        rows = [torch.empty_like(row) for _ in range(self.num_processes)]
        dist.all_gather(rows, row, group=self.group)
        return torch.cat(rows)

    def true_anywhere(self, condition: bool) -> bool:
        """Whether the condition holds on any process; the same answer on all."""
        return bool(self.gather(float(condition)).any())

    def gather_objects(self, item: Any) -> list[Any]:
        """The items of all processes, on every process. They are pickled: trusted objects only."""
        if self.group is None:
            return [item]
        items: list[Any] = [None] * self.num_processes
        dist.all_gather_object(items, item, group=self.group)
        return items

    def from_main(self, item: Any) -> Any:
        """The main process's item, everywhere."""
        if self.group is None:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Does `work` on the main process and returns its result on all. If it raises UserError or
        OSError, so does the main process, and the others raise UserError with the same message.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
            except (UserError, OSError) as error:
                failure = error
        # The message is sent instead of the exception: not every exception can be pickled.
        result, problem = self.from_main((result, str(failure) if failure else ""))
        if failure:
            raise failure
        if problem:
            raise UserError(problem)
        return result

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors on the CPU, in place, with those of the main process."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self.group)
