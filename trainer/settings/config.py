"""The settings of a training run, apart from the architecture, which `vidt.ViDTConfig` owns.

The fields define flags, YAML keys and help text: a new field is a new flag. `limits.py` has the
values that they may have, `parsing.py` reads them.
"""

from dataclasses import dataclass, field
from typing import Any

from trainer.settings.limits import AUTO, BEST_BY, check_alone, check_together
from vidt.model.config import CLASS_LOSSES
from vidt.weights.published import TEACHERS


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
        check_alone(self)
        check_together(self)
