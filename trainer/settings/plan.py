"""`--preset auto`: settings chosen from the fingerprint of a dataset, each with its reason.

nnU-Net (Isensee and others, Nature Methods 2021) does this for segmentation: a fingerprint of the
data, a few rules, a few values found by trial. Every rule below names its source or its
measurement; docs/recipes.md has the figures. A setting that the user gives wins over its rule.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from trainer.settings.config import TrainConfig, check_model, given_settings
from vidt.errors import counted

MOST_TOKENS = 900  # as many as the largest published DETRs have; tiles find more
LARGE = 20_000  # images from which the paper's recipe is the better guess: it was tuned on COCO
OBJECT = 48  # pixels that a small object should cover: three cells of the stride-16 map
PHOTOGRAPH = 224  # short side at which ImageNet's classes are told apart
# Pixels per second at which a core of an AMD EPYC trains swin_pico: docs/recipes.md, "Sizes".
CPU_PIXELS = 200_000
PASSES = 15  # over the images: with fewer, a smaller size learns more


@dataclass(frozen=True)
class Fingerprint:
    """What the rules know of a dataset and of the machine."""

    images: int
    classes: int
    boxes: int
    busiest: int  # boxes of the image with the most
    short_side: int  # of the images, median, pixels
    aspect: float  # long over short side, mean
    small_object: float  # side over the image's short side, that a tenth of the objects are below
    rarest: float  # share of the images that hold the rarest class
    crowding: float  # share of the boxes that overlap another one at IoU 0.5 or more
    gpu: bool
    threads: int
    pretrained: bool  # whether ImageNet weights can be had
    hours: float | None = None

    def line(self) -> str:
        """The fingerprint in one line."""
        return (
            f"{counted(self.images, 'image')}, {counted(self.classes, 'class', 'classes')}, "
            f"{counted(self.boxes, 'box', 'boxes')}, at most {self.busiest} in an image; short "
            f"sides of {self.short_side} pixels; a tenth of the objects are smaller than "
            f"{self.small_object:.0%} of that; {self.crowding:.0%} overlap at IoU 0.5; the rarest "
            f"class is in {self.rarest:.0%} of the images"
        )


class Choice(NamedTuple):
    """A setting that a rule chose, and why, in a few words."""

    name: str
    value: Any
    reason: str


def choices(data: Fingerprint) -> Iterator[Choice]:
    """The plan for a dataset. It is empty for a large one, which keeps the released recipe."""
    if data.images >= LARGE:
        return
    yield from start(data)
    yield from queries(data)
    yield from size(data)
    yield from losses()
    yield from optimisation(data)
    yield from length(data)
    yield from balance(data)


def start(data: Fingerprint) -> Iterator[Choice]:
    """Backbone and decoder. Measured: docs/recipes.md, "Backbones"."""
    if data.pretrained:
        name = "swin_tiny" if data.gpu else "swin_nano"
        yield Choice("backbone_name", name, "it has ImageNet weights, and fits this machine")
        return
    yield Choice("pre_trained", "none", "ImageNet weights cannot be had here")
    yield Choice("backbone_name", "swin_pico", "from random weights a small backbone learns faster")
    for name in ("reduced_dim", "pos_dim"):
        yield Choice(name, 128, "wide enough for a small backbone, and faster than 256")


def queries(data: Fingerprint) -> Iterator[Choice]:
    """Detection tokens: enough for the busiest image, and half as many again for images to come;
    more only cost. Three decoder layers learn faster than six from few images.
    """
    tokens = max(-(-data.busiest * 3 // 2 // 10) * 10, 20)
    yield Choice(
        "det_token_num",
        min(tokens, MOST_TOKENS),
        f"half as many again as the {data.busiest} of one image",
    )
    yield Choice("dec_layers", 3, "enough for few images, and faster than 6")
    yield Choice("dim_feedforward", 512, "enough for few images")
    yield Choice("dec_n_points", 2, "enough for few images")
    yield Choice("dropout", 0.0, "it slows short runs (H-DETR, arXiv 2207.13080)")


def size(data: Fingerprint) -> Iterator[Choice]:
    """Small objects cover OBJECT pixels, but the image has PHOTOGRAPH, as far as it has as many.
    Where a CPU would not pass over the images PASSES times in `--hours`, the size shrinks.
    """
    wanted, reason = OBJECT / max(data.small_object, 0.01), f"small objects cover {OBJECT} pixels"
    if wanted < PHOTOGRAPH:
        wanted, reason = PHOTOGRAPH, "enough to recognise what a photograph shows"
    if wanted > data.short_side:
        wanted, reason = data.short_side, "the images have no more pixels"
    if data.hours is not None and not data.gpu:
        pixels = data.hours * 3600 * CPU_PIXELS * data.threads / (data.images * PASSES)
        fitting = math.sqrt(pixels / data.aspect)
        if fitting < wanted:
            wanted, reason = fitting, f"so that {PASSES} passes over the images fit into the time"
    side = min(max(math.ceil(wanted / 16) * 16, 96), 640)
    yield Choice("eval_size", side, reason)
    if reason.startswith("so that"):
        yield Choice("train_sizes", (side,), "objects of many sizes take more passes to learn")
    else:
        sizes = tuple(range(max(side - 32, 64), side + 33, 16))
        yield Choice("train_sizes", sizes, "around the size of evaluation")
    yield Choice("crop", False, "the released crops are for objects of many sizes")


def losses() -> Iterator[Choice]:
    """Measured: docs/recipes.md, "Parts"."""
    yield Choice("class_loss", "matchability", "scores that tell how well a box fits (DEIM)")
    yield Choice("look_forward_twice", True, "boxes of neighbouring layers learn together (DINO)")
    yield Choice("denoising", 30, "the decoder learns from noisy boxes at once (DN-DETR)")


def optimisation(data: Fingerprint) -> Iterator[Choice]:
    """Rates measured on the embedded images: trainer/settings/recipes/shapes.yaml."""
    yield Choice("batch_size", 16 if data.gpu else 5, "many steps teach more than large batches")
    if data.pretrained:
        yield Choice("lr", 2e-4, "twice the released rate, for a short run")
    else:
        yield Choice("lr", 7.5e-4, "random weights stand large steps")
        yield Choice("lr_linear_proj_mult", 0.02, "positions must not move all at once")
        yield Choice("lr_backbone_mult", 1.5, "the backbone has the most to learn")
        yield Choice("lr_fan_in_power", 0.5, "narrow layers need larger steps")
    yield Choice("adam_beta2", 0.98, "a short memory for a short run")
    yield Choice("sched", "linear", "better than a cosine in short runs")
    yield Choice("warmup_share", 0.1, "a warm-up that shrinks with the run (DEIM)")
    yield Choice("num_workers", 0 if not data.gpu else 4, "loading is cheap beside a CPU's steps")


def length(data: Fingerprint) -> Iterator[Choice]:
    """Without --hours: about 6,000 steps, as many as a small dataset can use."""
    batch = 16 if data.gpu else 5
    if data.hours is None:
        epochs = min(max(round(6000 * batch / data.images), 12), 300)
        yield Choice("epochs", epochs, "about 6,000 steps, at least 12 passes")
        yield Choice("eval_interval", max(epochs // 10, 1), "ten evaluations")
        yield Choice("save_interval", max(epochs // 10, 1), "a checkpoint with each")


def balance(data: Fingerprint) -> Iterator[Choice]:
    """Repeat-factor sampling (LVIS, arXiv 1908.03195)."""
    if data.rarest < 0.05:
        yield Choice(
            "repeat_thresh", 0.05, f"the rarest class is in {data.rarest:.1%} of the images"
        )


def planned(
    config: TrainConfig, model: Mapping[str, Any], given: Collection[str], data: Fingerprint
) -> tuple[TrainConfig, dict[str, Any], str]:
    """The settings with the plan's choices for all that are not in `given`, and the plan in words:
    the fingerprint, then a line for each choice.
    """
    own, lines, taken = {**vars(config), **model}, [f"plan for {data.line()}"], {}
    for choice in choices(data):
        if choice.name not in given:
            taken[choice.name] = choice.value
            lines.append(f"  {choice.name} {in_words(choice.value)}: {choice.reason}")
        elif own[choice.name] != choice.value:
            told, value = in_words(own[choice.name]), in_words(choice.value)
            lines.append(f"  {choice.name} {told}: as given (the plan has {value})")
    if not taken:
        lines.append("  the released recipe, which was made for datasets of this size")
    return *merged(config, model, taken), "\n".join(lines)


def repeated(
    config: TrainConfig, model: Mapping[str, Any], given: Collection[str], saved: Path
) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings of a run's config.yaml for all that are not in `given`."""
    settings = given_settings(["--config", str(saved)])
    kept = {name: value for name, value in settings.items() if name not in {*given, "config"}}
    return merged(config, model, kept)


def merged(
    config: TrainConfig, model: Mapping[str, Any], taken: Mapping[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    fields = {name: value for name, value in taken.items() if name not in model}
    model = {name: taken.get(name, value) for name, value in model.items()}
    check_model(model)
    return replace(config, **fields), model


def in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
