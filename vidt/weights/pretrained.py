"""ImageNet weights for the body: timm's files where timm has them, the released URL for nano, or a
file.

Nothing is fetched twice: what is downloaded stays in timm's cache, or in torch hub's.
"""

from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from vidt.model.config import COAT_VARIANTS
from vidt.weights.published import Unreachable, local_weights
from vidt.weights.released import imagenet_coat, imagenet_swin
from vidt.weights.weights_file import UnusableWeights, read_pickled

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


def load_imagenet(body: nn.Module, backbone_name: str, pre_trained: str) -> None:
    """Fills `body` from `pre_trained`: "imagenet", "none" (left as it is) or a file.

    Everything but what ViDT adds ([DET] tokens and what serves them, the stride-64 map) must be in
    the weights.

    Raises Unreachable, naming the file to fetch by hand, or UnusableWeights, naming the missing or
    misshapen tensor, or the damaged file.
    """
    if pre_trained == "none":
        return
    if pre_trained == "imagenet":
        state_dict, source = _fetch(backbone_name), f"the ImageNet weights of {backbone_name}"
    else:
        state_dict, source = _read(pre_trained), pre_trained
    convert = imagenet_coat if backbone_name in COAT_VARIANTS else imagenet_swin
    converted = convert(state_dict)
    expected = body.state_dict()
    for name, tensor in converted.items():
        if name not in expected:
            raise UnusableWeights(f"{source}: tensor {name} has no place in {backbone_name}")
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, {backbone_name} needs {tuple(expected[name].shape)}"
            raise UnusableWeights(
                f"{source}: tensor {name} has shape {shapes}; choose the body's own file"
            )
    missing = [name for name in expected if name not in converted and not added_by_vidt(name)]
    if missing:
        raise UnusableWeights(
            f"{source}: {len(missing)} tensors of {backbone_name} are missing, first {missing[0]}"
        )
    body.load_state_dict({**expected, **converted}, strict=True)


def added_by_vidt(name: str) -> bool:
    """Tensors of the body that no ImageNet classifier has."""
    return (
        name in ("det_token", "det_pos_embed")
        or ".det_pos_linear." in name
        or ".det_exp." in name
        or name.startswith(("layers.3.downsample.", "patch_embed5."))
    )


def _fetch(backbone_name: str) -> dict[str, Tensor]:
    try:
        if backbone_name in URLS:
            return read_pickled(local_weights(URLS[backbone_name], "--pre_trained"))
        return timm.create_model(TIMM_NAMES[backbone_name], pretrained=True).state_dict()
    except Exception as error:  # every layer below has exceptions of its own for "no network"
        raise Unreachable(
            f"the ImageNet weights of {backbone_name} cannot be reached ({type(error).__name__}); "
            f"fetch {address(backbone_name)} by hand and pass --pre_trained FILE, or "
            "--pre_trained none to start from random"
        ) from error


def address(backbone_name: str) -> str:
    """Where a person finds the file."""
    if backbone_name in URLS:
        return URLS[backbone_name]
    return f"https://huggingface.co/timm/{TIMM_NAMES[backbone_name]}/resolve/main/model.safetensors"


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UnusableWeights(
            f'--pre_trained {path}: no such file (say "imagenet", "none" or a file)'
        )
    if path.endswith(".safetensors"):
        try:
            return load_file(path)
        except Exception as error:  # safetensors and the file system raise different kinds
            raise UnusableWeights(f"{path} cannot be read as safetensors: {error}") from error
    return read_pickled(path)
