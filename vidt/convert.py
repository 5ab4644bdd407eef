"""Converts a weights file of the released ViDT to ours, or back:

python -m vidt.convert vidt_plus_tiny_det300.pth tiny.safetensors
python -m vidt.convert best.safetensors for_the_released_code.pth
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from vidt.arguments import OneLineParser
from vidt.atomic import atomic_file
from vidt.errors import UserError
from vidt.model.vidt import build_detector
from vidt.weights.checkpoint import read_released
from vidt.weights.released import released_vidt as released_vidt
from vidt.weights.released import to_released, unread_tensors
from vidt.weights.weights_file import (
    UnusableWeights,
    WeightsInfo,
    fill_strictly,
    is_safetensors,
    load_unread,
    load_weights,
    read_pickled,
    save_weights,
)


def to_ours(source: Path, target: Path, class_names: tuple[str, ...] = ()) -> WeightsInfo:
    """Writes a released `.pth` file as our weights file. Tensors that our detector does not use are
    stored too, so that `to_theirs` can restore them. `class_names` override the file's.

    Raises UnusableWeights naming the file, and OSError naming the target.
    """
    tensors, info = read_released(source)
    info = dataclasses.replace(info, class_names=class_names or info.class_names)
    if len(info.class_names) != info.config.num_classes:
        given = len(info.class_names) or "no"
        raise UnusableWeights(
            f"{source} has {info.config.num_classes} classes and {given} class names; pass "
            "--class_names a,b,..."
        )
    fill_strictly(build_detector(info.config), tensors, source)
    save_weights(target, tensors, info, unread_tensors(read_pickled(source).tensors))
    return info


def to_theirs(source: Path, target: Path) -> WeightsInfo:
    """Writes our weights file for the released code: tensors under `model`, settings under `args`.
    It also holds the rest of the header for `to_ours`, which the released code ignores.

    Raises UnusableWeights naming the file, and OSError naming the target.
    """
    tensors, info = load_weights(source)
    settings = dataclasses.asdict(info.config) | dataclasses.asdict(info.preprocessing)
    settings |= {"cross_scale_fusion": info.config.epff, "masks": info.config.with_vector}
    content = {
        "model": to_released(tensors, info.config, load_unread(source)),
        "args": argparse.Namespace(**settings),
        "class_names": list(info.class_names),
        "metrics": info.metrics,
        "training": info.training,
        "thresholds": list(info.thresholds),
    }
    with atomic_file(target) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch raises it for a failed write
            raise OSError(str(error).splitlines()[0]) from error
    return info


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit codes: 0 success, 2 a user's error, printed as one line."""
    try:
        given = _parser().parse_args(argv)
        info = _convert(given.source, given.target, given.class_names)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.target}: {info.config}")
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "python -m vidt.convert",
        description="Converts weights of the released ViDT to ours, or back.",
        epilog="example: python -m vidt.convert vidt_plus_tiny_det300.pth tiny.safetensors",
    )
    parser.add_argument("source", type=Path, help="a released .pth file, or our .safetensors")
    parser.add_argument("target", type=Path, help="OUT.safetensors, or OUT.pth to convert back")
    parser.add_argument("--class_names", help="a,b,...; needed unless the classes are COCO's 91")
    return parser


def _convert(source: Path, target: Path, class_names: str | None) -> WeightsInfo:
    back = is_safetensors(source)
    suffix = ".pth" if back else ".safetensors"
    if target.suffix != suffix:
        raise UserError(f"{target}: {source} converts to a {suffix} file; name it so")
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} is the source file; give another name")
    if back and class_names is not None:
        raise UserError(f"--class_names {class_names}: {source} has its own; leave the flag out")
    return to_theirs(source, target) if back else to_ours(source, target, _names(class_names))


def _names(given: str | None) -> tuple[str, ...]:
    names = () if given is None else tuple(name.strip() for name in given.split(","))
    if "" in names or len(set(names)) != len(names):
        raise UserError(f"--class_names {given}: give each class a name of its own")
    return names


if __name__ == "__main__":
    sys.exit(main())
