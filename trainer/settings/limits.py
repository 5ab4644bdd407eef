"""The values that the settings of a run may have, each by itself and beside the others."""

import math
from typing import Any

from trainer.settings.flags import ConfigError
from vidt.arguments import MIXED_PRECISIONS
from vidt.errors import shown
from vidt.images.canvas import LARGEST_SIZE
from vidt.model.config import CLASS_LOSSES
from vidt.weights.published import TEACHERS

# The field that holds the path of each dataset. The embedded one has none; auto recognises the
# dataset by its content.
PATH_OF = {"coco": "coco_path", "voc": "voc_path", "yolo": "yolo_path", "auto": "data"}
DATASETS = ("shapes", *PATH_OF)
AUTO = -1  # batch_size and ema_decay that stand for what the set-up of a run chooses
WEIGHTS_OWN = 0  # eval_size that stands for the size saved with the weights
SMALLEST_SIZE = 32  # pixels: a backbone's coarsest map is 1/32 of the image
# Training queries and losses that need a decoder which refines boxes.
NEED_REFINEMENT = ("denoising", "look_forward_twice", "query_groups")
SCHEDULES = ("cosine", "linear", "flat_cosine")
SCALE_PER = ("step", "image")
PRESETS = ("released", "auto")
COCO_FILES = ("train_json", "train_images", "val_json", "val_images")
BEST_BY = ("map50", "map")
# Settings that hold paths on this machine.
PATHS = (
    *COCO_FILES,
    *PATH_OF.values(),
    *("output_dir", "tensorboard_dir", "config", "resume", "cache_images", "preview"),
)
# Parts of the augmentation that --plain_epochs ends; each value is a probability.
STRONG_PARTS = (
    *("iou_crop", "mosaic", "mixup", "copy_paste"),
    *("zoom_out", "scale_jitter", "affine", "photometric"),
)

_AT_LEAST = {
    **dict.fromkeys(("epochs", "max_steps", "n_iter_to_acc", "eval_batch_size"), 1),
    **dict.fromkeys(("eval_interval", "save_interval", "keep", "log_interval"), 1),
    **dict.fromkeys(("num_workers", "min_lr", "weight_decay", "warmup_steps"), 0),
    **dict.fromkeys(("clip_max_norm", "seed", "patience", "save_steps", "denoising", "freeze"), 0),
    **dict.fromkeys((*STRONG_PARTS, "plain_epochs", "rotation"), 0),
    **dict.fromkeys(("train_max_size",), SMALLEST_SIZE),
}
# Limits that no run comes near: beyond them a slip of the finger would fork, allocate or wait
# without end.
_AT_MOST = {
    **dict.fromkeys(("epochs", "eval_interval", "save_interval", "patience", "keep"), 10**6),
    **dict.fromkeys(("max_steps", "warmup_steps", "save_steps", "log_interval"), 10**9),
    **dict.fromkeys(("batch_size", "n_iter_to_acc", "eval_batch_size"), 65_536),
    **dict.fromkeys(("eval_size", "train_max_size"), LARGEST_SIZE),
    **{"num_workers": 256, "denoising": 10_000, "freeze": 4, "plain_epochs": 10**6},
    **{"rotation": 180, **dict.fromkeys(STRONG_PARTS, 1)},
}


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {shown(value)}; it must be {expected}")


def check_alone(config: Any) -> None:
    """Checks each value of a `TrainConfig` by itself. The comparisons are false for NaN."""
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        _require(value is None or value >= least, name, value, f"{least} or more")
    for name, most in _AT_MOST.items():
        value = getattr(config, name)
        _require(value is None or value <= most, name, value, f"at most {most:,}")
    automatic = config.batch_size == AUTO
    _require(
        automatic or config.batch_size >= 1, "batch_size", config.batch_size, "1 or more, or auto"
    )
    datasets = f"one of {', '.join(DATASETS)}"
    _require(config.dataset_file in DATASETS, "dataset_file", config.dataset_file, datasets)
    size, own = config.eval_size, config.eval and config.eval_size == WEIGHTS_OWN
    _require(own or size >= SMALLEST_SIZE, "eval_size", size, f"{SMALLEST_SIZE} or more")
    _require(config.lr > 0, "lr", config.lr, "above 0")
    for name in ("lr_linear_proj_mult", "lr_backbone_mult"):
        mult = getattr(config, name)
        _require(0 <= mult < math.inf, name, mult, "0 or more")
    power = config.lr_fan_in_power
    _require(0 <= power <= 2, "lr_fan_in_power", power, "from 0 to 2")
    decay = config.lr_layer_decay
    _require(0 < decay <= 1, "lr_layer_decay", decay, "above 0 and at most 1")
    share = config.warmup_share
    _require(0 <= share <= 1 / 3, "warmup_share", share, "from 0 to a third")
    schedules = f"one of {', '.join(SCHEDULES)}"
    _require(config.sched in SCHEDULES, "sched", config.sched, schedules)
    losses = f"one of {', '.join(CLASS_LOSSES)}"
    _require(config.class_loss in CLASS_LOSSES, "class_loss", config.class_loss, losses)
    presets = f"one of {', '.join(PRESETS)}"
    _require(config.preset in PRESETS, "preset", config.preset, presets)
    hours = config.hours
    _require(hours is None or 0 < hours <= 10_000, "hours", hours, "above 0")
    scales = f"one of {', '.join(SCALE_PER)}"
    _require(config.scale_per in SCALE_PER, "scale_per", config.scale_per, scales)
    metrics = f"one of {', '.join(BEST_BY)}"
    _require(config.best_by in BEST_BY, "best_by", config.best_by, metrics)
    precision, precisions = config.mixed_precision, f"one of {', '.join(MIXED_PRECISIONS)}"
    _require(precision in MIXED_PRECISIONS, "mixed_precision", precision, precisions)
    _require(0 <= config.adam_beta2 < 1, "adam_beta2", config.adam_beta2, "0 or more and below 1")
    _require(config.seed < 2**32, "seed", config.seed, "below 4294967296")
    decay = config.ema_decay
    known = decay == AUTO or 0 <= decay < 1
    _require(known, "ema_decay", decay, "0 or more and below 1, or auto")
    coef = config.distil_loss_coef
    _require(0 < coef < math.inf, "distil_loss_coef", coef, "above 0")
    teachers = f"one of {', '.join(TEACHERS)}"
    known = config.distil_model is None or config.distil_model in TEACHERS
    _require(known, "distil_model", config.distil_model, teachers)
    for name in ("max_bad_fraction", "repeat_thresh"):
        _require(0 <= getattr(config, name) <= 1, name, getattr(config, name), "from 0 to 1")
    held = config.val_fraction
    _require(0 < held < 1, "val_fraction", held, "above 0 and below 1")
    factors = config.scale_jitter_range
    _require(
        len(factors) == 2 and 0.1 <= factors[0] <= factors[1] <= 10,
        "scale_jitter_range",
        factors,
        "two rising numbers from 0.1 to 10",
    )
    sizes = config.train_sizes
    _require(sizes != (), "train_sizes", "empty", "one size or more, or none")
    for size in sizes or ():
        _require(size >= SMALLEST_SIZE, "train_sizes", size, f"{SMALLEST_SIZE} or more")
        _require(size <= LARGEST_SIZE, "train_sizes", size, f"at most {LARGEST_SIZE:,}")
    _require(len(sizes or ()) <= 1000, "train_sizes", f"{len(sizes or ())} sizes", "at most 1,000")


def check_together(config: Any) -> None:
    """Checks values that depend on each other."""
    if config.eval and config.check:
        raise ConfigError("--eval and --check exclude each other; drop one")
    if config.load_from is not None and config.resume is not None:
        raise ConfigError("--load_from and --resume exclude each other; drop --load_from")
    started = config.load_from or config.resume or config.eval or config.pre_trained != "none"
    if config.freeze and not started:
        raise ConfigError(
            f"freeze is {config.freeze}, but the backbone starts from random weights, which would "
            "never learn; give --load_from or --pre_trained"
        )
    _require(config.min_lr <= config.lr, "min_lr", config.min_lr, f"at most lr, {config.lr}")
    if config.batch_size == AUTO and (config.eval or config.n_iter_to_acc > 1):
        other = "eval" if config.eval else f"n_iter_to_acc {config.n_iter_to_acc}"
        raise ConfigError(f"batch_size is auto; with {other} it must be a number")
    # A plan chooses the batch size later.
    whole = config.preset == "auto" or config.batch_size % config.n_iter_to_acc == 0
    divisor = f"a divisor of batch_size, {config.batch_size}"
    _require(whole, "n_iter_to_acc", config.n_iter_to_acc, divisor)
    paths = [n for n in (*PATH_OF.values(), *COCO_FILES) if getattr(config, n) is not None]
    if config.data is not None and len(paths) > 1:
        (second, *_) = [name for name in paths if name != "data"]
        raise ConfigError(f"--data and --{second} exclude each other; drop one")
    for name, path in PATH_OF.items():
        if getattr(config, path) is not None and config.dataset_file != name:
            raise ConfigError(f"{path} is for dataset_file {name}; it is {config.dataset_file}")
    needed, number = (COCO_FILES[2:], "both") if config.eval else (COCO_FILES, "all four")
    given = [name for name in COCO_FILES if getattr(config, name) is not None]
    missing = [name for name in needed if name not in given]
    if given and missing:
        raise ConfigError(f"{given[0]} is given without {', '.join(missing)}; give {number}")
    if given and config.dataset_file != "coco":
        raise ConfigError(f"{given[0]} is for dataset_file coco; it is {config.dataset_file}")


def check_data_path(config: Any) -> None:
    """Raises ConfigError for a dataset without a path, unless it is the embedded one."""
    if config.dataset_file == "shapes" or config.val_json:
        return
    flag = PATH_OF[config.dataset_file]
    if getattr(config, flag):
        return
    files = " or " + ", ".join(COCO_FILES) if config.dataset_file == "coco" else ""
    raise ConfigError(f"--dataset_file {config.dataset_file} needs a path; give {flag}{files}")
