"""ImageNet weights for the backbone: from timm, for nano from the released URL, or from a file.

Downloads are cached by timm or by torch hub.
"""

import logging
from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from vidt.errors import shown
from vidt.model.config import COAT_VARIANTS
from vidt.weights.published import Unreachable, local_weights
from vidt.weights.released import imagenet_coat, imagenet_swin
from vidt.weights.weights_file import UnusableWeights, read_pickled

logger = logging.getLogger(__name__)

TIMM_NAMES = {
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base_win7_22k": "swin_base_patch4_window7_224.ms_in22k",
    "swin_large_win7_22k": "swin_large_patch4_window7_224.ms_in22k",
    **{name: f"{name}.in1k" for name in COAT_VARIANTS},
}
URLS = {
    "swin_nano": "https://github.com/naver-ai/vidt/releases/download/v0.1-swin/swin_nano_patch4_window7_224.pth",
}


def load_imagenet(backbone: nn.Module, backbone_name: str, pre_trained: str) -> None:
    """Loads weights into `backbone` from `pre_trained`: "imagenet", "none" (no change) or a file.

    The weights must hold every tensor except those that ViDT adds (see `added_by_vidt`).

    Raises Unreachable, naming the file to download, or UnusableWeights, naming the missing or
    misshapen tensor or the damaged file.
    """
    if pre_trained == "none":
        return
    if pre_trained == "imagenet":
        if backbone_name not in {**TIMM_NAMES, **URLS}:
            raise UnusableWeights(
                f"{backbone_name} has no ImageNet weights; pass --pre_trained none, or a file"
            )
        state_dict, source = _fetch(backbone_name), f"the ImageNet weights of {backbone_name}"
    else:
        state_dict, source = _read(pre_trained), pre_trained
    convert = imagenet_coat if backbone_name in COAT_VARIANTS else imagenet_swin
    converted = convert(state_dict)
    expected = backbone.state_dict()
    for name, tensor in converted.items():
        if name not in expected:
            raise UnusableWeights(f"{source}: tensor {name} has no place in {backbone_name}")
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, {backbone_name} needs {tuple(expected[name].shape)}"
            raise UnusableWeights(
                f"{source}: tensor {name} has shape {shapes}; choose the file of this backbone"
            )
    missing = [name for name in expected if name not in converted and not added_by_vidt(name)]
    if missing:
        raise UnusableWeights(
            f"{source}: {len(missing)} tensors of {backbone_name} are missing, first {missing[0]}"
        )
    backbone.load_state_dict({**expected, **converted}, strict=True)


def imagenet_at_hand(backbone_name: str) -> bool:
    """Whether the ImageNet weights can be had; fetches them, and logs why it cannot."""
    try:
        return backbone_name in {**TIMM_NAMES, **URLS} and bool(_fetch(backbone_name))
    except Unreachable as error:
        logger.warning(str(error))
        return False


def added_by_vidt(name: str) -> bool:
    """Whether no ImageNet classifier has this tensor: [DET] tokens, their layers, the stride-64
    map.
    """
    return (
        name in ("det_token", "det_pos_embed")
        or ".det_pos_linear." in name
        or ".det_exp." in name
        or name.startswith(("layers.3.downsample.", "patch_embed5."))
    )


def _fetch(backbone_name: str) -> dict[str, Tensor]:
    try:
        if backbone_name in URLS:
            return read_pickled(local_weights(URLS[backbone_name], "--pre_trained")).tensors
        return timm.create_model(TIMM_NAMES[backbone_name], pretrained=True).state_dict()
    except Exception as error:  # every library below has its own exceptions for "no network"
        reason = shown(str(error).partition("\n")[0] or type(error).__name__, 200)
        raise Unreachable(
            f"the ImageNet weights of {backbone_name} cannot be reached ({reason}); "
            f"fetch {address(backbone_name)} by hand and pass --pre_trained FILE, or "
            "--pre_trained none to start from random"
        ) from error


def address(backbone_name: str) -> str:
    """URL of the weights, for a download by hand."""
    if backbone_name in URLS:
        return URLS[backbone_name]
    return f"https://huggingface.co/timm/{TIMM_NAMES[backbone_name]}/resolve/main/model.safetensors"


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UnusableWeights(
            f'--pre_trained {path}: no such file (pass "imagenet", "coco", "none" or a file)'
        )
    if path.endswith(".safetensors"):
        try:
            return load_file(path)
        except Exception as error:  # safetensors and the file system raise different types
            raise UnusableWeights(f"{path} cannot be read as safetensors: {error}") from error
    return read_pickled(path).tensors
