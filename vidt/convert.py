"""A released file as one of ours, or the other way round:

python -m vidt.convert vidt_plus_tiny_det300.pth tiny.safetensors
python -m vidt.convert best.safetensors for_the_released_code.pth
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from vidt.checkpoint import read_released
from vidt.model import build_detector
from vidt.preprocessing import Preprocessing
from vidt.released import (
    imagenet_swin,
    released_config,
    released_name,
    released_vidt,
    to_released,
    unread_tensors,
)
from vidt.weights_file import (
    UnusableWeights,
    WeightsInfo,
    fill_strictly,
    is_ours,
    load_kept,
    load_weights,
    read_pickled,
    save_weights,
)

__all__ = [
    "imagenet_swin",
    "main",
    "released_config",
    "released_name",
    "released_vidt",
    "to_ours",
    "to_released",
    "to_theirs",
]


def to_ours(source: Path, target: Path, class_names: tuple[str, ...] | None = None) -> WeightsInfo:
    """Writes a released `.pth` file as one of ours, with what our detector does not read beside its
    tensors, for the way back. Raises UnusableWeights naming the file.
    """
    tensors, config, names = read_released(source)
    names = class_names or names
    if names is None or len(names) != config.num_classes:
        given = "no class names" if names is None else f"{len(names)} class names"
        raise UnusableWeights(
            f"{source} has {config.num_classes} classes and {given}; pass --class_names a,b,..."
        )
    fill_strictly(build_detector(config), tensors, source)
    info = WeightsInfo(config, names, Preprocessing())
    save_weights(target, tensors, info, unread_tensors(read_pickled(source)))
    return info


def to_theirs(source: Path, target: Path) -> WeightsInfo:
    """Writes a weights file of ours as the released code reads it: tensors under `model`, settings
    under `args`. Raises UnusableWeights naming the file.
    """
    tensors, info = load_weights(source)
    settings = dataclasses.asdict(info.config)
    settings |= {"cross_scale_fusion": info.config.epff, "masks": info.config.with_vector}
    settings |= {"eval_size": info.preprocessing.eval_size}
    content = {
        "model": to_released(tensors, info.config, load_kept(source)),
        "args": argparse.Namespace(**settings),
        "class_names": list(info.class_names),
    }
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        torch.save(content, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return info


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 2 a user's error, told in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m vidt.convert", description="Weights of the released ViDT to ours, or back."
    )
    parser.add_argument("source", type=Path, help="a released .pth file, or one of ours")
    parser.add_argument("target", type=Path, help="OUT.safetensors, or OUT.pth for the way back")
    parser.add_argument("--class_names", help="a,b,...; for a file that is not of COCO's 91 ids")
    given = parser.parse_args(argv)
    names = tuple(given.class_names.split(",")) if given.class_names else None
    try:
        back = is_ours(given.source)
        wanted = ".pth" if back else ".safetensors"
        if given.target.suffix != wanted:
            raise ValueError(f"{given.target}: of {given.source} comes a {wanted} file; name it so")
        info = (
            to_theirs(given.source, given.target)
            if back
            else to_ours(given.source, given.target, names)
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.target}: {info.config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
