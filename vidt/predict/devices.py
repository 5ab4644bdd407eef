"""Which device to compute on."""

import torch

from vidt.errors import UserError


def usable_device(name: str | None) -> torch.device:
    """The device of that name; without a name a GPU if there is one, else the CPU.

    Raises UserError for a device that PyTorch does not know or does not find here.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name}; it must be cpu, cuda or cuda:1, for example") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        found = torch.cuda.device_count()
        here = f"{found} CUDA devices" if found else "no GPU that PyTorch can use"
        raise UserError(f"device is {name}; there is {here} here: try cpu") from None
    if device.type == "meta":
        raise UserError("device is meta; it must be one that computes, such as cpu")
    return device
