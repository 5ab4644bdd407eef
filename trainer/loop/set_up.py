"""The set-up of a run: seed, model, starting weights or checkpoint, optimiser, data."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.augmentation.denoising import Denoising
from trainer.augmentation.recipe import Augmentation
from trainer.backward.freezing import freeze_stages
from trainer.backward.gradient_sum import GradientSum
from trainer.backward.gradients import gradients
from trainer.backward.memory import (
    Probe,
    checkpoint_activations,
    fitting_batch_size,
    fitting_micro_batches,
    largest_canvas,
)
from trainer.data.image_cache import ImageCache
from trainer.data.loader import DetectionDataset
from trainer.data.loader_wait import LoaderWait
from trainer.data.order import epoch_images, repeat_factors, steps_per_epoch
from trainer.loop.agreement import Agreement
from trainer.loop.clock import Clock
from trainer.loop.optim import ema_decay_of, make_ema, make_optimizer
from trainer.loop.resume import Checkpoint, RunState
from trainer.loop.start import find_checkpoint, load_start, load_teacher, make_way, restore
from trainer.loop.time_limit import StepTimer, within_hours
from trainer.readers.samples import SampleTable
from trainer.settings.config import TrainConfig
from trainer.settings.limits import AUTO, STRONG_PARTS
from trainer.settings.parsing import resolved
from vidt.errors import UserError, counted
from vidt.images.preprocessing import Preprocessing
from vidt.losses.criterion import SetCriterion, criterion_for
from vidt.losses.distillation import TokenMatching
from vidt.losses.softmax_criterion import SoftmaxCriterion
from vidt.model.config import ViDTConfig
from vidt.model.vidt import build_detector, compile_blocks
from vidt.ops.precision import prepare_training

logger = get_logger(__name__)


@dataclass
class Run:
    """Everything that the loop works with. `state` and `micro_batches` change from step to step."""

    config: TrainConfig
    model_config: ViDTConfig
    accelerator: Accelerator
    agreement: Agreement
    model: nn.Module
    gradient_sum: GradientSum
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    criterion: SetCriterion | SoftmaxCriterion
    teacher: TokenMatching | None
    dataset: DetectionDataset
    loader_wait: LoaderWait
    clock: Clock
    state: RunState
    micro_batches: Iterator[dict[str, Any]] | None = None  # of the steps to come

    @property
    def evaluated_model(self) -> nn.Module:
        """The model to evaluate and to save: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module


def set_up(
    config: TrainConfig,
    model_fields: Mapping[str, Any],
    train_set: SampleTable,
    val_set: SampleTable,
    accelerator: Accelerator,
    agreement: Agreement,
    *,
    test_images: int = 0,
) -> Run:
    """Builds a run, fresh or at the step that it resumes from. `test_images` are evaluated once, at
    the end, which `--hours` allows for. Raises UserError.
    """
    prepare_training(accelerator.device, tf32=config.tf32)
    set_seed(config.seed)
    class_names = train_set.class_names
    model_config = ViDTConfig(**{**model_fields, "num_classes": len(class_names)})
    require_denoising(config, model_config)
    warn_of_idle_settings(config, model_config)

    detector = build_detector(model_config)
    checkpoint = find_checkpoint(config, agreement)
    if checkpoint is None:
        load_start(detector, config, class_names, agreement)
    teacher = load_teacher(config, model_config, accelerator, agreement)
    ema = make_ema(detector, config.ema_decay).to(accelerator.device) if config.ema else None
    if config.freeze:
        freeze_stages(detector, config.freeze)
    if config.activation_checkpointing:
        checkpoint_activations(detector)
    if config.compile:
        compile_blocks(detector)
    # Prepared "for evaluation", which leaves DistributedDataParallel out: see `GradientSum`.
    model: nn.Module = accelerator.prepare_model(detector, evaluation_mode=True).train()
    scaled = accelerator.scaler is not None
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config, scaled=scaled))
    gradient_sum = GradientSum(model.parameters(), accelerator.num_processes)
    criterion = criterion_for(
        model_config,
        class_loss=config.class_loss,
        contrastive_denoising=config.contrastive_denoising,
    )
    dataset = training_dataset(config, model_config, train_set, agreement)

    learn = partial(
        gradients,
        model,
        criterion,
        accelerator,
        num_boxes=1.0,
        teacher=teacher,
        denoising_queries=config.denoising,
        gradient_sum=gradient_sum,
    )
    probe = make_probe(config, dataset, optimizer, accelerator, learn, agreement)
    config, n_iter_to_acc = fitted_to_memory(config, probe, checkpoint, len(train_set), accelerator)
    step_images = config.batch_size * accelerator.num_processes
    shown = images_of_epoch(config, train_set)
    per_epoch = steps_per_epoch(shown, step_images)
    config = within_hours(
        config,
        checkpoint,
        StepTimer(dataset, learn, optimizer, accelerator, agreement),
        n_iter_to_acc=n_iter_to_acc,
        per_epoch=per_epoch,
        val_images=len(val_set),
        test_images=test_images,
    )
    total_steps = config.epochs * per_epoch
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)
    if ema is not None and config.ema_decay == AUTO:
        ema.decay = automatic_ema_decay(checkpoint, total_steps)
        config = replace(config, ema_decay=ema.decay)
    limit_strong_parts(dataset, config, total_steps / per_epoch, model_config)
    state = RunState(
        n_iter_to_acc=n_iter_to_acc,
        step_images=step_images,
        dataset=train_set.fingerprint(),
        settings=resolved(config, model_fields),
    )
    if checkpoint is not None:
        state = restore(checkpoint, state, model, ema, optimizer, accelerator)
        if probe.possible():
            state.n_iter_to_acc = fitting_micro_batches(probe, config, state.n_iter_to_acc)
    make_way(config, checkpoint, state, agreement)
    return Run(
        config=config,
        model_config=model_config,
        accelerator=accelerator,
        agreement=agreement,
        model=model,
        gradient_sum=gradient_sum,
        ema=ema,
        optimizer=optimizer,
        criterion=criterion,
        teacher=teacher,
        loader_wait=LoaderWait(
            config,
            accelerator.device,
            num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        ),
        dataset=dataset,
        clock=Clock(per_epoch, total_steps, step_images, len(val_set), config.eval_interval),
        state=state,
    )


def training_dataset(
    config: TrainConfig, model: ViDTConfig, samples: SampleTable, agreement: Agreement
) -> DetectionDataset:
    """The images to train on, through the cache if there is one. Raises UserError for a cache
    folder that cannot be made, and for --copy_paste without masks.
    """
    if config.copy_paste and samples.masks is None:
        raise UserError(
            f"--copy_paste {config.copy_paste:g} cuts objects out along their masks, and no object "
            f"of {samples.source} has one; leave it out"
        )
    denoising = Denoising(
        config.denoising,
        config.contrastive_denoising,
        model.num_classes if model.label_embedding else None,
    )
    augmentation, cache = Augmentation.from_config(config), None
    if config.cache_images is not None:
        cache = ImageCache(config.cache_images, samples, augmentation)
        logger.info(agreement.on_main(cache.open_folder))
    return DetectionDataset(
        samples,
        augmentation,
        Preprocessing(eval_size=config.eval_size),
        seed=config.seed,
        denoising=denoising,
        cache=cache,
        masks=model.with_vector or model.token_label,
    )


def limit_strong_parts(
    dataset: DetectionDataset, config: TrainConfig, epochs: float, model: ViDTConfig
) -> None:
    """Ends the strong parts of the augmentation --plain_epochs before the run of `epochs` ends, and
    logs a line on them.
    """
    total = math.ceil(epochs)
    strong = int(epochs) - config.plain_epochs if config.plain_epochs else total
    dataset.strong_epochs = max(strong, 0)
    on = dataset.augmentation.strong.on
    if not on:
        return
    parts = ", ".join(f"--{name} {probability:g}" for name, probability in on.items())
    strong = min(int(dataset.strong_epochs), total)
    line = f"augmentation: {parts} in the first {counted(strong, 'epoch')} of {total}"
    if dataset.most_boxes > max(int(dataset.samples.box_counts.max()), model.det_token_num):
        line += (
            f"; an image may get {dataset.most_boxes} boxes, more than --det_token_num "
            f"{model.det_token_num} can predict"
        )
    logger.info(line)


def make_probe(
    config: TrainConfig,
    dataset: DetectionDataset,
    optimizer: Optimizer,
    accelerator: Accelerator,
    learn: Callable[..., dict[str, Tensor] | None],
    agreement: Agreement,
) -> Probe:
    """The trial of this run's largest step; learn is `gradients` but for batches and canvas."""
    augmentation = dataset.augmentation
    sizes = dataset.samples.sizes.tolist()
    canvas = largest_canvas(augmentation, sizes, mixed=not config.group_by_aspect)
    return Probe(
        dataset,
        optimizer,
        canvas,
        accelerator.device,
        partial(learn, canvas=canvas),
        agreement.true_anywhere,
    )


def fitted_to_memory(
    config: TrainConfig,
    probe: Probe,
    checkpoint: Checkpoint | None,
    num_images: int,
    accelerator: Accelerator,
) -> tuple[TrainConfig, int]:
    """The settings with the number that `--batch_size auto` stands for, and the micro-batches with
    which the largest step of a fresh run fits. Raises OutOfMemory if none does.
    """
    if config.batch_size == AUTO:
        found = automatic_batch_size(probe, checkpoint, num_images, accelerator)
        return replace(config, batch_size=found), config.n_iter_to_acc
    if probe.possible() and checkpoint is None:
        return config, fitting_micro_batches(probe, config, config.n_iter_to_acc)
    return config, config.n_iter_to_acc


def automatic_batch_size(
    probe: Probe, checkpoint: Checkpoint | None, num_images: int, accelerator: Accelerator
) -> int:
    """The images per process that `--batch_size auto` stands for: as many as in the checkpoint,
    else as fit on a GPU, else the default.
    """
    processes = accelerator.num_processes
    if checkpoint is not None:
        found, why = max(checkpoint.state.step_images // processes, 1), "as in the checkpoint"
    elif probe.possible():
        found = fitting_batch_size(probe, num_images // processes)
        why = "the largest power of two that fits"
    else:
        found, why = TrainConfig.batch_size, "the default, since only a GPU is tried"
    logger.info(
        f"--batch_size auto: {counted(found, 'image')} per process, {why}; "
        f"{found * processes} per step; the learning rate is not scaled with it"
    )
    return found


def automatic_ema_decay(checkpoint: Checkpoint | None, total_steps: int) -> float:
    """The decay that `--ema_decay auto` stands for: as in the checkpoint, even for a run that has
    become longer, else by the length of the run.
    """
    if checkpoint is not None:
        decay, why = checkpoint.state.settings["ema_decay"], "as in the checkpoint"
        if not isinstance(decay, float):  # it was saved with --no-ema
            return ema_decay_of(total_steps)
    else:
        decay, why = ema_decay_of(total_steps), f"for {counted(total_steps, 'step')}"
    logger.info(f"--ema_decay auto: {decay:.6g}, {why}")
    return decay


def images_of_epoch(config: TrainConfig, samples: SampleTable) -> int:
    """How many images an epoch shows, with those that `--repeat_thresh` repeats."""
    if not config.repeat_thresh:
        return len(samples)
    factors = repeat_factors(samples, config.repeat_thresh)
    shown = epoch_images(factors)
    logger.info(
        f"--repeat_thresh {config.repeat_thresh:g}: an epoch shows {counted(shown, 'image')} "
        f"instead of {len(samples)}, those of the rarest class {factors.max():.2g} times"
    )
    return shown


def require_denoising(config: TrainConfig, model: ViDTConfig) -> None:
    """Raises UserError for --denoising with a model that cannot denoise, and for
    --contrastive_denoising without --denoising.
    """
    if config.contrastive_denoising and not config.denoising:
        raise UserError("--contrastive_denoising needs --denoising, which is 0; drop it")
    if config.denoising and not model.with_box_refine:
        raise UserError("--denoising needs --with_box_refine: its queries start from boxes")
    if config.denoising and (model.method != "vidt" or not model.dec_layers):
        flags = f"--method {model.method} --dec_layers {model.dec_layers}"
        raise UserError(f"--denoising needs a decoder; {flags} has none")


def warn_of_idle_settings(config: TrainConfig, model: ViDTConfig) -> None:
    """Warns of settings that were changed and do nothing without others."""
    if model.label_embedding and not config.denoising:
        logger.warning("--label_embedding does nothing without --denoising")
    if config.class_loss != "focal" and model.method != "vidt":
        logger.warning(f"--class_loss {config.class_loss} does nothing with method {model.method}")
    for name, needs in (
        ("rotation", ("affine",)),
        ("scale_jitter_range", ("scale_jitter",)),
        ("plain_epochs", STRONG_PARTS),
    ):
        changed = getattr(config, name) != getattr(TrainConfig, name)
        if changed and not any(getattr(config, part) for part in needs):
            parts = f"--{needs[0]}" if len(needs) == 1 else "a part of the augmentation to end"
            logger.warning(f"--{name} does nothing without {parts}")
