"""What a run ran on: versions, device, precision, processes."""

import os
import platform
from importlib import metadata

import torch
from accelerate import Accelerator

PACKAGES = ("vidt", "torch", "torchvision", "accelerate", "timm", "numpy", "pillow", "pycocotools")


def environment_of(accelerator: Accelerator) -> dict[str, str]:
    """Names and values for people, of this process's machine."""
    facts = {
        "device": _device(accelerator.device),
        "processes": str(accelerator.num_processes),
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "threads a process": str(torch.get_num_threads()),
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
    }
    if torch.version.cuda:
        facts["CUDA of PyTorch"] = torch.version.cuda
    return facts | {name: _version(name) for name in PACKAGES}


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
