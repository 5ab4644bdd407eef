"""What flags of other trainers are called here. People bring them from Ultralytics, the scripts of
Hugging Face, RF-DETR, detectron2 and DETR; a message names ours.
"""

# Names with the same meaning and unit as a setting of ours.
_RENAMED = {
    "lr": ("learning_rate", "lr0", "base_lr"),
    "epochs": ("num_train_epochs", "num_epochs", "max_epochs"),
    "max_steps": ("max_train_steps", "max_iter", "max_iters"),
    "batch_size": (
        "batch",
        "train_batch_size",
        "per_device_train_batch_size",
        "per_gpu_batch_size",
    ),
    "eval_batch_size": ("per_device_eval_batch_size", "val_batch_size"),
    "weight_decay": ("adam_weight_decay",),
    "clip_max_norm": ("max_grad_norm", "grad_clip", "clip_grad"),
    "warmup_steps": ("num_warmup_steps", "lr_warmup_steps", "warmup_iters"),
    "sched": ("lr_scheduler", "lr_scheduler_type"),
    "ema": ("use_ema",),
    "num_workers": ("workers", "dataloader_num_workers"),
    "resume": ("resume_from_checkpoint",),
    "save_steps": ("checkpointing_steps", "checkpoint_steps"),
    "save_interval": ("checkpoint_interval", "save_period", "save_every"),
    "keep": ("checkpoints_total_limit", "save_total_limit"),
    "eval_interval": ("eval_period", "val_interval"),
    "patience": ("early_stopping_patience",),
    "best_by": ("metric_for_best_model",),
    "tensorboard_dir": ("logging_dir", "log_dir"),
    "log_interval": ("logging_steps", "print_freq", "log_every", "log_period"),
    "load_from": (
        "weights",
        "model",
        "checkpoint",
        "finetune",
        "model_name_or_path",
        "pretrained_model_name_or_path",
        "pretrain_weights",
        "pretrained_checkpoint",
    ),
    "pre_trained": ("pretrained", "pretrained_backbone"),
    "backbone_name": ("backbone", "encoder"),
    "det_token_num": ("num_queries",),
    "eval_size": ("imgsz", "img_size", "image_size", "input_size", "resolution"),
    "eval": ("eval_only", "val_only", "do_eval"),
    "output_dir": ("project", "save_dir", "work_dir", "out_dir"),
    "config": ("config_file", "cfg"),
    "activation_checkpointing": ("gradient_checkpointing", "use_checkpoint"),
    "compile": ("torch_compile",),
    "with_vector": ("masks", "segmentation_head"),
    "flip": ("fliplr",),
}
_MICRO_BATCHES = (
    "--n_iter_to_acc N splits --batch_size into N micro-batches, where others multiply it by N; "
    "give --batch_size the images of a whole step per process"
)
_PRECISION = "--mixed_precision bf16 or fp16 chooses it, --mixed_precision no is fp32"
_PATHS = "--data takes a dataset of any layout"
_PROCESSES = "accelerate launch --num_processes N trainer/train.py starts several processes"
_TRACKERS = (
    "TensorBoard is on; --report_to tensorboard,wandb names other trackers, --report_to none none"
)
_DIFFERENT = {
    "device": "CUDA_VISIBLE_DEVICES=1 vidt train ... takes that GPU, an empty one the CPU",
    "warmup_epochs": "--warmup_steps counts optimiser steps",
    "lrf": "--min_lr is the learning rate at the end, not a share of lr",
    "lr_backbone": "--lr_backbone_mult is relative to lr, such as 0.1",
    "lr_encoder": "--lr_backbone_mult is relative to lr, such as 0.1",
    "cos_lr": "--sched cosine is the default",
    "cache": "--cache_images FOLDER caches decoded images",
    "multi_scale": "--train_sizes 480,512,544 are the short sides to choose from",
    "early_stopping": "--patience N ends a run after N evaluations without a better one",
    "overwrite_output_dir": "an earlier run in output_dir moves into its folder earlier; leave it",
    "exist_ok": "an earlier run in output_dir moves into its folder earlier; leave it out",
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum_steps"), _MICRO_BATCHES),
    **dict.fromkeys(("accumulate", "accumulate_grad_batches"), _MICRO_BATCHES),
    **dict.fromkeys(("precision", "amp", "fp16", "bf16", "half", "use_amp"), _PRECISION),
    **dict.fromkeys(("dataset_dir", "dataset_name", "train_data_dir", "data_dir"), _PATHS),
    **dict.fromkeys(("num_gpus", "gpus", "num_machines", "dist_url", "world_size"), _PROCESSES),
    **dict.fromkeys(("with_tracking", "tensorboard", "wandb", "mlflow"), _TRACKERS),
    **dict.fromkeys(
        ("eval_steps", "eval_strategy", "evaluation_strategy"),
        "--eval_interval counts epochs between evaluations",
    ),
    "save_strategy": "--save_interval counts epochs, --save_steps optimiser steps",
}
ELSEWHERE = {
    **{
        theirs: f"its name here is --{ours}" for ours, names in _RENAMED.items() for theirs in names
    },
    **_DIFFERENT,
}
