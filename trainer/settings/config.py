"""Settings of a training run and its command line.

Every setting has one owner: architecture in `vidt.ViDTConfig` (saved with the weights),
optimisation, data and precision in `TrainConfig`, machines in accelerate's own file. The fields
of the two dataclasses define flags, YAML keys and help text: a new field is a new flag. A flag
overrides the `--config` file, which overrides the dataset's recipe (`recipes/<dataset_file>.yaml`),
which overrides the default of the dataclass.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from trainer.settings.flags import (
    ConfigError,
    HelpRequested,
    help_lines,
    read_flags,
    read_value,
    read_yaml,
    settings_of,
)
from trainer.settings.other_names import ELSEWHERE
from trainer.settings.yaml_text import BadYAML, read_limited
from vidt.arguments import MIXED_PRECISIONS
from vidt.atomic import atomic_write
from vidt.errors import UserError, escaped, shown
from vidt.model.config import CLASS_LOSSES, ViDTConfig
from vidt.weights.published import PUBLISHED, TEACHERS, is_remote, published_for

# The field with the path of each dataset but the embedded one; auto is told by its content.
PATH_OF = {"coco": "coco_path", "voc": "voc_path", "yolo": "yolo_path", "auto": "data"}
DATASETS = ("shapes", *PATH_OF)
AUTO = -1  # batch_size and ema_decay that stand for what the set-up of a run chooses
WEIGHTS_OWN = 0  # eval_size that stands for the size saved with the weights
SMALLEST_SIZE = 32  # pixels: a backbone's coarsest map is 1/32 of the image
LARGEST_SIZE = 16_384  # pixels: three times the largest canvas that a large GPU holds
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


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and data of a run. Raises ConfigError for invalid values."""

    data: str | None = field(
        default=None,
        metadata=_help(
            "folder of a COCO, YOLO or Pascal VOC dataset of any layout, told by its content, or "
            "its annotation file",
            group="Data",
        ),
    )
    val_fraction: float = field(
        default=0.2,
        metadata=_help("share of the images to validate on if --data has no validation part"),
    )
    dataset_file: str = field(
        default="shapes",
        metadata=_help("which dataset: shapes, coco, voc, yolo, or auto for --data"),
    )
    coco_path: str | None = field(
        default=None,
        metadata=_help(
            "folder with annotations/instances_{train,val}2017.json, train2017/, val2017/"
        ),
    )
    voc_path: str | None = field(default=None, metadata=_help("folder of a Pascal VOC dataset"))
    yolo_path: str | None = field(
        default=None, metadata=_help("folder of a YOLO dataset, or its yaml file")
    )
    train_json: str | None = field(default=None, metadata=_help("COCO file to train on"))
    train_images: str | None = field(
        default=None, metadata=_help("folder of the images that train_json names")
    )
    val_json: str | None = field(default=None, metadata=_help("COCO file to validate on"))
    val_images: str | None = field(
        default=None, metadata=_help("folder of the images that val_json names")
    )
    num_workers: int = field(
        default=2, metadata=_help("processes that load images, for each training process")
    )
    cache_images: str | None = field(
        default=None,
        metadata=_help(
            "folder in which training images are cached, decoded and shrunk to what the "
            "augmentation can need; runs may share it; None: no cache"
        ),
    )
    max_bad_fraction: float = field(
        default=0.05,
        metadata=_help("largest share of damaged images to skip; the run ends if there are more"),
    )
    strict_images: bool = field(
        default=False,
        metadata=_help("leave out JPEG files whose end is missing, instead of using the rest"),
    )
    check: bool = field(default=False, metadata=_help("only check the dataset"))

    flip: bool = field(
        default=True, metadata=_help("mirror images at random", group="Augmentation")
    )
    crop: bool = field(
        default=True, metadata=_help("crop images at random before they are resized")
    )
    photometric: float = field(
        default=0.0,
        metadata=_help(
            "probability that an image changes in brightness, contrast, saturation and hue; 0: off"
        ),
    )
    zoom_out: float = field(
        default=0.0,
        metadata=_help(
            "probability that an image shrinks, to a quarter of its sides at most, on a canvas of "
            "its own size; 0: off"
        ),
    )
    iou_crop: float = field(
        default=0.0,
        metadata=_help(
            "probability of a crop that overlaps an object by a random least IoU, as in SSD; 0: off"
        ),
    )
    affine: float = field(
        default=0.0,
        metadata=_help(
            "probability that an image is rotated, shifted by up to a tenth and sheared by up to 2 "
            "degrees; 0: off"
        ),
    )
    rotation: float = field(
        default=5.0, metadata=_help("largest rotation of --affine, degrees; 0: none")
    )
    scale_jitter: float = field(
        default=0.0,
        metadata=_help(
            "probability that an image is scaled by a factor from --scale_jitter_range, and cut or "
            "filled up to its own size; 0: off"
        ),
    )
    scale_jitter_range: tuple[float, ...] = field(
        default=(0.5, 2.0),
        metadata=_help("least and largest factor of --scale_jitter; 0.1,2 is the large-scale one"),
    )
    mosaic: float = field(
        default=0.0,
        metadata=_help(
            "probability that an image shares its canvas with three others, each in one of four "
            "fields; 0: off"
        ),
    )
    mixup: float = field(
        default=0.0,
        metadata=_help(
            "probability that an image is blended with another one, objects of both; 0: off"
        ),
    )
    copy_paste: float = field(
        default=0.0,
        metadata=_help(
            "probability that objects of another image, cut out along their masks, are pasted onto "
            "an image; needs masks; 0: off"
        ),
    )
    plain_epochs: int = field(
        default=0,
        metadata=_help(
            "epochs at the end of the run without any part from --photometric to --copy_paste"
        ),
    )
    preview: str | None = field(
        default=None,
        metadata=_help(
            "folder for preview.jpg, which shows the first augmented images with their boxes; it "
            "is written before the first step, and training goes on; None: only output_dir gets "
            "one, and only if a part from --photometric to --copy_paste is on",
        ),
    )
    train_sizes: tuple[int, ...] | None = field(
        default=None,
        metadata=_help(
            "short sides to choose from at random, pixels; None: the released ones, scaled to "
            "eval_size"
        ),
    )
    train_max_size: int | None = field(
        default=None,
        metadata=_help("largest long side, pixels; None: the released one, scaled to eval_size"),
    )
    scale_per: str = field(
        default="step",
        metadata=_help(
            "whether each step or each image draws a short side; image is the released way"
        ),
    )
    group_by_aspect: bool = field(
        default=True,
        metadata=_help("give images of similar aspect ratio to the same optimiser step"),
    )
    repeat_thresh: float = field(
        default=0.0,
        metadata=_help(
            "show images more than once an epoch if they hold a class that less than this share of "
            "the images has; 0: each image once"
        ),
    )

    preset: str = field(
        default="released",
        metadata=_help(
            "released: the paper's recipe; auto, the default with --data: settings chosen from the "
            "data, which vidt plan shows; a setting that is given always wins",
            group="Optimisation",
        ),
    )
    hours: float | None = field(
        default=None,
        metadata=_help(
            "time for the run, start and evaluations included: the number of epochs is found by a "
            "trial; None: epochs"
        ),
    )
    epochs: int = field(default=50, metadata=_help("passes over the training images"))
    max_steps: int | None = field(
        default=None, metadata=_help("optimiser steps after which the run ends; None: no limit")
    )
    batch_size: int = field(
        default=2,
        metadata=_help(
            "images per process and optimiser step; auto: the largest power of two that fits on "
            "the GPU",
            words={"auto": AUTO},
        ),
    )
    n_iter_to_acc: int = field(
        default=1,
        metadata=_help(
            "micro-batches into which batch_size is split; others' accumulation steps multiply it"
        ),
    )
    lr: float = field(default=1e-4, metadata=_help("learning rate after the warm-up"))
    lr_linear_proj_mult: float = field(
        default=1.0,
        metadata=_help(
            "learning rate of reference points, sampling offsets and position embeddings, relative "
            "to lr"
        ),
    )
    lr_backbone_mult: float = field(
        default=1.0,
        metadata=_help("learning rate of the backbone and its [DET] tokens, relative to lr"),
    )
    lr_fan_in_power: float = field(
        default=0.0,
        metadata=_help(
            "a matrix with n inputs trains at lr times (256 / n) to this power; 0: all matrices "
            "train at lr"
        ),
    )
    lr_layer_decay: float = field(
        default=1.0,
        metadata=_help(
            "each layer of the backbone trains at this times the learning rate of the layer after "
            "it; 1: all at the same"
        ),
    )
    freeze: int = field(
        default=0,
        metadata=_help(
            "stages of the backbone, 1 to 4, that do not train, and with them the patch embedding; "
            "[DET] tokens do; 0: none"
        ),
    )
    min_lr: float = field(default=1e-7, metadata=_help("learning rate at the end"))
    sched: str = field(
        default="cosine",
        metadata=_help(
            "learning-rate schedule after the warm-up: cosine, linear, or flat_cosine, which "
            "decays in the second half of the run"
        ),
    )
    weight_decay: float = field(default=1e-4, metadata=_help("weight decay of AdamW"))
    adam_beta2: float = field(
        default=0.999, metadata=_help("decay of AdamW's average of squared gradients")
    )
    warmup_steps: int = field(
        default=200, metadata=_help("steps of warm-up; at most a third of the run")
    )
    warmup_share: float = field(
        default=0.0,
        metadata=_help(
            "share of the run's steps, up to a third, to warm up for, instead of warmup_steps; "
            "0: warmup_steps"
        ),
    )
    clip_max_norm: float = field(
        default=0.1, metadata=_help("gradient norm to clip at; 0: no clipping")
    )
    denoising: int = field(
        default=0,
        metadata=_help(
            "denoising queries per image, which start at noisy ground-truth boxes; 0: none"
        ),
    )
    contrastive_denoising: bool = field(
        default=False,
        metadata=_help(
            "half of the denoising queries start farther away and learn that they are background"
        ),
    )
    class_loss: str = field(
        default="focal", metadata=_help("loss of the class scores: " + ", ".join(CLASS_LOSSES))
    )
    ema: bool = field(
        default=True, metadata=_help("keep a moving average of the weights and evaluate it")
    )
    ema_decay: float = field(
        default=0.9998,
        metadata=_help(
            "decay of that average at each step; auto: by the length of the run",
            words={"auto": AUTO},
        ),
    )
    seed: int = field(default=42, metadata=_help("seed of all random numbers"))

    mixed_precision: str = field(
        default="auto",
        metadata=_help(
            "bf16, fp16, or no for fp32; auto: what the launcher was told, else bf16 where the GPU "
            "computes it natively, else fp32",
            group="Execution",
        ),
    )
    tf32: bool = field(
        default=True,
        metadata=_help("train with TF32 on the GPU for what is computed in fp32"),
    )
    compile: bool = field(
        default=False,
        metadata=_help(
            "compile the model's blocks with torch.compile; the first steps take minutes"
        ),
    )
    activation_checkpointing: bool = field(
        default=False,
        metadata=_help(
            "recompute activations in the backward pass: less memory, a third more time"
        ),
    )

    eval_size: int = field(
        default=640,
        metadata=_help(
            "short side at evaluation and prediction, pixels; with --eval the default is the size "
            "saved in the weights",
            group="Evaluation",
        ),
    )
    eval_batch_size: int | None = field(
        default=None, metadata=_help("images per process and batch; None: batch_size")
    )
    eval_interval: int = field(default=1, metadata=_help("epochs between evaluations"))
    patience: int = field(
        default=0,
        metadata=_help("evaluations without a better best_by before the run ends; 0: never"),
    )
    best_by: str = field(
        default="map50",
        metadata=_help(
            "metric that chooses best.safetensors and that patience watches: "
            + " or ".join(BEST_BY)
        ),
    )
    eval: bool = field(default=False, metadata=_help("only evaluate"))

    pre_trained: str = field(
        default="imagenet",
        metadata=_help(
            "weights to start from: imagenet, none or a file for the backbone; coco for all of the "
            "published detector of this backbone",
            group="Weights and state",
        ),
    )
    load_from: str | None = field(
        default=None,
        metadata=_help(
            "weights to start from: a file, a URL, or the name of a published model, which sets "
            "the architecture; vidt models lists them"
        ),
    )
    distil_model: str | None = field(
        default=None,
        metadata=_help("teacher to distil from: " + ", ".join(TEACHERS)),
    )
    distil_model_path: str | None = field(
        default=None,
        metadata=_help("weights of the teacher: a file or a URL; None: the published ones"),
    )
    distil_loss_coef: float = field(default=4.0, metadata=_help("weight of the distillation loss"))
    allow_http: bool = field(
        default=False, metadata=_help("fetch weights from an http address, unencrypted, too")
    )
    resume: str | None = field(
        default=None,
        metadata=_help(
            "folder of the run to resume; --resume alone means output_dir",
            bare="auto",
            saved=False,
        ),
    )
    save_interval: int = field(default=1, metadata=_help("epochs between resumable checkpoints"))
    save_steps: int = field(
        default=0, metadata=_help("optimiser steps between additional checkpoints; 0: none")
    )
    keep: int = field(default=2, metadata=_help("number of checkpoints to keep"))

    output_dir: str = field(
        default="output", metadata=_help("folder of the results", group="Output")
    )
    tensorboard_dir: str | None = field(
        default=None, metadata=_help("folder of the event files; None: output_dir/tensorboard")
    )
    report_to: tuple[str, ...] = field(
        default=("tensorboard",),
        metadata=_help(
            "where curves go: tensorboard and trackers of accelerate, such as wandb, mlflow and "
            "trackio, separated by commas; or none",
            words={"none": ()},
        ),
    )
    log_interval: int = field(default=10, metadata=_help("steps between log lines"))
    config: str | None = field(
        default=None, metadata=_help("YAML file with any of these settings", saved=False)
    )

    def __post_init__(self) -> None:
        if self.train_sizes is not None:
            object.__setattr__(self, "train_sizes", tuple(self.train_sizes))
        object.__setattr__(self, "scale_jitter_range", tuple(self.scale_jitter_range))
        _check_alone(self)
        _check_together(self)


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


def _check_alone(config: TrainConfig) -> None:
    """Checks each value by itself. The comparisons are false for NaN."""
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


def _check_together(config: TrainConfig) -> None:
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


def _check_data_path(config: TrainConfig) -> None:
    """Raises ConfigError for a dataset without a path, unless it is the embedded one."""
    if config.dataset_file == "shapes" or config.val_json:
        return
    flag = PATH_OF[config.dataset_file]
    if getattr(config, flag):
        return
    files = " or " + ", ".join(COCO_FILES) if config.dataset_file == "coco" else ""
    raise ConfigError(f"--dataset_file {config.dataset_file} needs a path; give {flag}{files}")


_TRAIN = settings_of(TrainConfig)
_MODEL = settings_of(ViDTConfig)
# The data can determine this architectural value; None means that it was not given.
_MODEL["num_classes"] = replace(_MODEL["num_classes"], optional=True, default=None)
_ALL = {**_TRAIN, **_MODEL}
assert len(_ALL) == len(_TRAIN) + len(_MODEL), "a setting has two owners"


def parse(argv: Sequence[str], *, own_data: bool = False) -> tuple[TrainConfig, dict[str, Any]]:
    """Parses flags to a run's settings and the fields of its ViDTConfig.

    `num_classes` is None unless given, since the data determines it; with --eval `dec_layers` is
    too, since the weights determine it. With `own_data` the caller supplies the samples: no recipe
    applies and no path is required. Raises ConfigError, and HelpRequested for `--help`.
    """
    given = given_settings(argv)
    if any(given.get(name) is not None for name in COCO_FILES):
        given.setdefault("dataset_file", "coco")
    for name, path in PATH_OF.items():
        if given.get(path) is not None:
            given.setdefault("dataset_file", name)
    if given.get("eval"):
        given.setdefault("eval_size", WEIGHTS_OWN)
        given.setdefault("dec_layers", None)
    elif given.get("data") is not None:
        given.setdefault("preset", "auto")
    published = _architecture_of(given.get("load_from"))
    recipe: dict[str, Any] = {}
    if not own_data and given.get("preset") != "auto":
        recipe = _fitting(_read_recipe(given.get("dataset_file", TrainConfig.dataset_file)), given)
    given = {**recipe, **published, **given}
    try:
        return _checked(given, own_data)
    except ConfigError as error:
        if given.get("config") is None:
            raise
        raise ConfigError(f"{error} (--config {shown(given['config'], 300)} was read)") from None


def fixed_settings(argv: Sequence[str]) -> frozenset[str]:
    """The names of settings that are given, or that follow from the published model given with
    --load_from: `--preset auto` leaves them alone.
    """
    given = given_settings(argv)
    return frozenset({**_architecture_of(given.get("load_from")), **given})


def _architecture_of(load_from: str | None) -> dict[str, Any]:
    """The model's settings that --load_from with the name of a published model stands for."""
    if load_from not in PUBLISHED or not is_remote(load_from):
        return {}
    defaults = {name: setting.default for name, setting in _MODEL.items()}
    return {**defaults, **PUBLISHED[load_from].architecture}


def _checked(given: Mapping[str, Any], own_data: bool) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings given and the defaults of the others. Raises ConfigError."""
    config = TrainConfig(**{name: given[name] for name in _TRAIN if name in given})
    model = {name: given.get(name, setting.default) for name, setting in _MODEL.items()}
    check_model(model)
    if config.pre_trained == "coco" and config.load_from is None and config.resume is None:
        _check_published(model)
    if not own_data:
        _check_data_path(config)
    return config, model


def given_settings(argv: Sequence[str]) -> dict[str, Any]:
    """The settings given as flags or in the `--config` file, without defaults. Raises ConfigError
    and HelpRequested.
    """
    given = read_flags(argv, _ALL, ELSEWHERE)
    if given.get("config") is not None:
        read = _read_config(given["config"])
        if given.get("resume") is not None:
            read.pop("load_from", None)  # the checkpoint replaces the starting weights
        if read.get("hours") is not None and given.keys() & {"hours", "epochs", "max_steps"}:
            del read["hours"]  # and what a trial found for them
            read.pop("max_steps", None)
        given = {**read, **given}
    return given


def read_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run saved, as `resolved` gives them, without those that are unknown
    here. Raises ConfigError.
    """
    return {
        name: read_value(_ALL[name], raw, f"the run to resume: {name}")
        for name, raw in saved.items()
        if name in _ALL
    }


def _read_config(path: str) -> dict[str, Any]:
    try:
        text = read_limited(path).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"config {shown(path, 300)} cannot be read: {error.strerror}") from None
    except BadYAML as error:
        raise ConfigError(f"config {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {shown(path, 300)} cannot be read: it is not text") from None
    except ValueError as error:  # a zero byte in the name
        raise ConfigError(f"config {shown(path, 300)} cannot be read: {error}") from None
    nestable = {name: setting for name, setting in _ALL.items() if name != "config"}
    return read_yaml(text, nestable, path, ELSEWHERE)


def _read_recipe(dataset_file: str) -> dict[str, Any]:
    """The recipe of a dataset; empty if it has none."""
    if dataset_file not in DATASETS:  # reported with the other values
        return {}
    recipe = resources.files("trainer.settings") / "recipes" / f"{dataset_file}.yaml"
    if not recipe.is_file():
        return {}
    return read_yaml(recipe.read_text(encoding="utf-8"), _ALL, str(recipe))


def _fitting(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what the given architecture cannot have."""
    method, layers = given.get("method", "vidt"), given.get("dec_layers", 1)
    refines = method == "vidt" and layers != 0 and given.get("with_box_refine", True)
    left_out = () if refines else NEED_REFINEMENT
    if method != "vidt":
        left_out = (*left_out, "class_loss")
    return {name: value for name, value in recipe.items() if name not in left_out}


def check_model(model: Mapping[str, Any]) -> None:
    """Raises ConfigError if ViDTConfig raises. Its defaults stand in for fields that the data
    or the weights determine later.
    """
    try:
        ViDTConfig(**{name: value for name, value in model.items() if value is not None})
    except UserError as error:
        raise ConfigError(str(error)) from None


def _check_published(model: Mapping[str, Any]) -> None:
    try:
        published_for(model["backbone_name"], method=model["method"], epff=model["epff"])
    except UserError as error:
        raise ConfigError(str(error)) from None


def parse_or_exit(argv: Sequence[str] | None = None) -> tuple[TrainConfig, dict[str, Any]]:
    """`parse` for a program: ends it with one line and code 2 on an error, with 0 on `--help`."""
    try:
        return parse(sys.argv[1:] if argv is None else argv)
    except HelpRequested:
        sys.stdout.write(help_text())
        sys.exit(0)
    except ConfigError as error:
        sys.stderr.write(f"error: {escaped(str(error))}\n")
        sys.exit(2)


def help_text() -> str:
    """All flags by group, with defaults and descriptions."""
    lines = [
        "Flags may have - or _. --NAME alone means True, --no-NAME False.",
        "Flags override --config FILE, then the dataset's recipe, then the defaults shown.",
        "",
        *help_lines(_TRAIN),
        "",
        "Architecture:",
        *help_lines(_MODEL),
    ]
    return "\n".join(lines) + "\n"


def resolved(config: TrainConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run as YAML values, except those of a single start, such as --resume."""
    owned = [name for name, setting in _TRAIN.items() if setting.metadata.get("saved", True)]
    values = {name: getattr(config, name) for name in owned} | {
        name: model[name] for name in _MODEL
    }
    return {name: _ALL[name].as_yaml(value) for name, value in values.items()}


def default_settings() -> dict[str, Any]:
    """The defaults of all settings, as `resolved` gives them."""
    return {name: setting.as_yaml(setting.default) for name, setting in _ALL.items()}


def write_yaml(path: str | Path, config: TrainConfig, model: Mapping[str, Any]) -> None:
    """Writes the file with which `--config` repeats the run."""
    text = yaml.safe_dump(resolved(config, model), sort_keys=False)
    atomic_write(path, f"# All settings of a run: --config THIS_FILE repeats it.\n{text}".encode())
