"""`--preset auto`: settings chosen from the fingerprint of a dataset, each with its reason.

nnU-Net (Isensee and others, Nature Methods 2021) does this for segmentation: a fingerprint of the
data, a few rules, a few values found by trial. docs/recipes.md has what was measured; constants
without a source are guesses. A setting that the user gives wins over its rule.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from trainer.settings.config import TrainConfig
from trainer.settings.flags import ConfigError
from trainer.settings.limits import AUTO, PATHS, SMALLEST_SIZE
from trainer.settings.parsing import check_model, in_words, read_saved
from vidt.errors import counted

Settings: TypeAlias = Mapping[str, Any]  # of a run so far: what is given, else what is chosen
Names: TypeAlias = Collection[str]  # of the settings that a plan leaves alone

FEWEST_TOKENS = 20
MOST_TOKENS = 900  # as many as the largest published DETRs have; tiles find more
LARGE = 20_000  # images from which the paper's recipe is the better guess: it was tuned on COCO
OBJECT = 48  # pixels that a small object should cover: three cells of the stride-16 map
PHOTOGRAPH = 224  # short side at which ImageNet's classes are told apart
CPU_PIXELS = 200_000  # that a core trains on in a second, roughly; only the size rests on it
STEPS = 6000  # without --hours
SMALLEST_SIDE, LARGEST_SIDE = 96, 640  # pixels of eval_size
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
    threads: int  # of a process
    processes: int
    pretrained: bool  # whether the run starts from weights, if only the backbone's
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


def start(data: Fingerprint, now: Settings, fixed: Names) -> Iterator[Choice]:
    """Backbone and decoder. Measured: docs/recipes.md, "Parts"."""
    if data.pretrained:
        name = "swin_tiny" if data.gpu else "swin_nano"
        yield Choice("backbone_name", name, "it has ImageNet weights, and fits this machine")
        return
    yield Choice("pre_trained", "none", "ImageNet weights are not at hand, or not wanted")
    yield Choice("backbone_name", "swin_pico", "from random weights a small backbone learns faster")
    for name in ("reduced_dim", "pos_dim"):
        yield Choice(name, 128, "wide enough for a small backbone, and faster than 256")


def queries(data: Fingerprint, now: Settings, fixed: Names) -> Iterator[Choice]:
    """Detection tokens: enough for the busiest image, and half as many again for images to come;
    more only cost. Three decoder layers learn faster than six from few images.
    """
    wanted = math.ceil(1.5 * data.busiest / 10) * 10
    tokens = min(max(wanted, FEWEST_TOKENS), MOST_TOKENS)
    reason = f"half as many again as the {counted(data.busiest, 'object')} of one image"
    if tokens != wanted:
        limit = "fewest" if tokens > wanted else "most"
        reason = f"the {limit} of a plan; one image has {counted(data.busiest, 'object')}"
    yield Choice("det_token_num", tokens, reason)
    yield Choice("dec_layers", 3, "enough for few images, and faster than 6")
    yield Choice("dim_feedforward", 512, "enough for few images")
    yield Choice("dec_n_points", 2, "enough for few images")
    yield Choice("dropout", 0.0, "it slows short runs (H-DETR, arXiv 2207.13080)")


def size(data: Fingerprint, now: Settings, fixed: Names) -> Iterator[Choice]:
    """Small objects cover OBJECT pixels, but the image has PHOTOGRAPH, as far as it has as many.
    Where a CPU would not pass over the images PASSES times in `--hours`, the size shrinks.
    """
    wanted, reason = OBJECT / max(data.small_object, 0.01), f"small objects cover {OBJECT} pixels"
    if wanted < PHOTOGRAPH:
        wanted, reason = PHOTOGRAPH, "enough to recognise what a photograph shows"
    if wanted > data.short_side:
        wanted, reason = data.short_side, "the images have no more pixels"
    hurried = False
    if data.hours is not None and not data.gpu:
        seconds = data.hours * 3600
        pixels = seconds * CPU_PIXELS * data.threads * data.processes / (data.images * PASSES)
        hurried = math.sqrt(pixels / data.aspect) < wanted
        if hurried:
            wanted = math.sqrt(pixels / data.aspect)
            reason = f"about {PASSES} passes over the images fit into the time, at a guess"
    side = min(max(math.ceil(wanted / 16) * 16, SMALLEST_SIDE), LARGEST_SIDE)
    if side < wanted or side - 16 >= wanted:
        reason = f"the {'largest' if side < wanted else 'smallest'} of a plan"
    yield Choice("eval_size", side, reason)
    side = now["eval_size"]
    if hurried:
        yield Choice("train_sizes", (side,), "objects of many sizes take more passes to learn")
    else:
        sizes = tuple(range(max(side - 32, SMALLEST_SIZE), side + 33, 16))
        yield Choice("train_sizes", sizes, "around the size of evaluation")
    yield Choice("crop", False, "the released crops are for objects of many sizes")


def losses(data: Fingerprint, now: Settings, fixed: Names) -> Iterator[Choice]:
    """Measured: docs/recipes.md, "Parts". What needs a decoder that refines boxes is left out
    without one.
    """
    if now["method"] == "vidt":
        yield Choice("class_loss", "matchability", "scores that tell how well a box fits (DEIM)")
        if now["with_box_refine"] and now["dec_layers"]:
            yield Choice("denoising", 30, "the decoder learns from noisy boxes at once (DN-DETR)")


def optimisation(data: Fingerprint, now: Settings, fixed: Names) -> Iterator[Choice]:
    """Rates measured on the embedded images: trainer/settings/recipes/shapes.yaml. Those of a start
    with swin_pico, which has no published weights: docs/recipes.md, "Fine-tuning".
    """
    parts = now["n_iter_to_acc"]
    batch = math.ceil((16 if data.gpu else 5) / parts) * parts
    yield Choice("batch_size", batch, "many steps teach more than large batches")
    if data.pretrained and now["backbone_name"] == "swin_pico":
        yield Choice("lr", 5e-4, "a start from few images stands large steps, if not the largest")
        yield Choice("lr_linear_proj_mult", 0.1, "positions move less than the rest")
        yield Choice("lr_fan_in_power", 0.5, "narrow layers need larger steps")
    elif data.pretrained:
        yield Choice("lr", 2e-4, "twice the released rate, for a short run")
    else:
        yield Choice("lr", 7.5e-4, "random weights stand large steps")
        yield Choice("lr_linear_proj_mult", 0.02, "positions must not move all at once")
        yield Choice("lr_backbone_mult", 1.5, "the backbone has the most to learn")
        yield Choice("lr_fan_in_power", 0.5, "narrow layers need larger steps")
    yield Choice("best_by", "map", "of few boxes map50 is noisy, and boxes tighten until the end")
    yield Choice("adam_beta2", 0.98, "a short memory for a short run")
    yield Choice("sched", "linear", "better than a cosine in short runs")
    if "warmup_steps" not in fixed or "warmup_share" in fixed:
        yield Choice("warmup_share", 0.1, "a warm-up that shrinks with the run (DEIM)")
    if data.gpu:
        yield Choice("num_workers", 4, "a GPU would wait for one process that loads")
    else:
        yield Choice("num_workers", 0, "loading is cheap beside a CPU's steps")


def length(data: Fingerprint, now: Settings, fixed: Names) -> Iterator[Choice]:
    """Without --hours: about STEPS steps, as many as a small dataset can use. Raises ConfigError
    if they cannot be counted yet.
    """
    if data.hours is None:
        if now["batch_size"] == AUTO and "epochs" not in fixed:
            raise ConfigError(
                "batch_size is auto, so the plan cannot tell how many epochs are enough; give "
                "--epochs or --hours"
            )
        per_epoch = max(now["batch_size"], 1) * data.processes / data.images
        epochs = min(max(round(STEPS * per_epoch), 12), 300)
        yield Choice("epochs", epochs, f"about {STEPS:,} steps, from 12 to 300 passes")
        interval = max(now["epochs"] // 20, 1)
        evaluations = counted(math.ceil(now["epochs"] / interval), "evaluation")
        yield Choice("eval_interval", interval, evaluations)
        yield Choice("save_interval", now["eval_interval"], "a checkpoint with each")


def balance(data: Fingerprint, now: Settings, fixed: Names) -> Iterator[Choice]:
    """Repeat-factor sampling (LVIS, arXiv 1908.03195)."""
    if data.rarest < 0.05:
        yield Choice(
            "repeat_thresh", 0.05, f"the rarest class is in {data.rarest:.1%} of the images"
        )


RULES = (start, queries, size, losses, optimisation, length, balance)


def planned(
    config: TrainConfig, model: Mapping[str, Any], fixed: Names, data: Fingerprint
) -> tuple[TrainConfig, dict[str, Any], str]:
    """The settings with the plan's choices for all that are not in `fixed`, and the plan in words:
    the fingerprint, then a line for each choice. Raises ConfigError for settings that do not fit
    together.
    """
    now, lines, taken = {**vars(config), **model}, [f"plan for {data.line()}"], {}
    for rule in RULES if data.images < LARGE else ():
        for name, value, reason in rule(data, now, fixed):
            if name not in fixed:
                now[name] = taken[name] = value
            if now[name] == value:
                lines.append(f"  {name} {in_words(name, value)}: {reason}")
            else:
                told, other = in_words(name, now[name]), in_words(name, value)
                lines.append(f"  {name} {told}: as given, or as the start has it, not {other}")
    if data.images >= LARGE:
        lines.append("  the released recipe, which was made for datasets of this size")
    config, model = merged(config, model, taken)
    replace(config, preset="released")  # checks what is left unchecked before a plan
    return config, model, "\n".join(lines)


def planned_sizes(
    config: TrainConfig, model: Mapping[str, Any], fixed: Names, data: Fingerprint
) -> tuple[int, int]:
    """--det_token_num and --eval_size of the plan, which do not depend on the start."""
    now = {**vars(config), **model}
    for rule in (queries, size) if data.images < LARGE else ():
        for name, value, _ in rule(data, now, fixed):
            now[name] = now[name] if name in fixed else value
    return now["det_token_num"], now["eval_size"]


def repeated(
    config: TrainConfig, model: Mapping[str, Any], fixed: Names, saved: Mapping[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings that a run saved for all that are not in `fixed`, except data, folders, the
    precision and the start of that run. A length that is given replaces its --hours.
    """
    settings = read_saved(saved)
    own = {*fixed, *PATHS, *("load_from", "dataset_file", "num_classes", "mixed_precision")}
    if {"epochs", "max_steps"} & set(fixed) and settings.get("hours") is not None:
        settings |= {"hours": None, "max_steps": None}
        own -= {"hours"}  # given again with the rest of the command
    kept = {name: value for name, value in settings.items() if name not in own}
    return merged(config, model, kept)


def merged(
    config: TrainConfig, model: Mapping[str, Any], taken: Mapping[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    fields = {name: value for name, value in taken.items() if name not in model}
    model = {name: taken.get(name, value) for name, value in model.items()}
    check_model(model)
    return replace(config, **fields), model
