"""Which precision suits a device, and PyTorch's switches for what stays in float32."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The lowest compute capabilities with native bf16 and with fast fp16. Older GPUs emulate bf16,
# which is slower than fp32, or run fp16 slowly.
NATIVE_BF16, FAST_FP16 = (8, 0), (7, 0)


def best_precision(device: torch.device) -> tuple[str, str]:
    """What `auto` means on a device, and why: "bf16" on a GPU that computes it natively, else "no",
    which is fp32.
    """
    if device.type != "cuda":
        return "no", f"auto on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability >= NATIVE_BF16:
        return "bf16", "auto: this GPU computes it natively"
    hint = "; --mixed_precision fp16 would be faster" if capability >= FAST_FP16 else ""
    return "no", f"auto: this GPU lacks bf16{hint}"


def prepare_training(device: torch.device, *, tf32: bool) -> None:
    """Sets this process's switches for training on CUDA; does nothing on other devices."""
    if device.type != "cuda":
        return
    set_tf32(tf32)
    # cuDNN's attention with a mask gave NaN gradients on H100 (pytorch/pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)


def set_tf32(enabled: bool) -> None:
    """Whether products and convolutions of float32 round their inputs to TF32 (10 bits) on CUDA.

    These are the older of PyTorch's two sets of switches, which must not be mixed: torch.compile
    reads them, and the newer ones are missing in 2.8. Leave them alone where there is no CUDA: some
    versions take them for a CPU's float32 as well.
    """
    _set_tf32(enabled, enabled)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, float32 on CUDA is never rounded to TF32. cuDNN rounds or not depending on shapes, so
    that a result would depend on the images that share its batch.
    """
    if device.type != "cuda":
        yield
        return
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    set_tf32(False)
    try:
        yield
    finally:
        _set_tf32(*before)


def _set_tf32(products: bool, convolutions: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch 2.9 advertises the newer switches
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions
