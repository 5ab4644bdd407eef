"""The set-up of a run: seed, model, starting weights or checkpoint, optimiser, data."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    set_seed,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

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
    use_expandable_segments,
)
from trainer.data.denoising import Denoising
from trainer.data.image_cache import ImageCache
from trainer.data.loader import DetectionDataset, micro_batches
from trainer.data.loader_wait import LoaderWait
from trainer.data.order import epoch_images, repeat_factors, steps_per_epoch
from trainer.loop import resume
from trainer.loop.agreement import DEVICE_PATIENCE, Agreement
from trainer.loop.clock import Clock
from trainer.loop.launch_check import cpu_of_launcher
from trainer.loop.optim import ema_decay_of, make_ema, make_optimizer
from trainer.loop.resume import Checkpoint, RunState
from trainer.loop.start import load_start, load_teacher
from trainer.loop.time_limit import (
    MOST_TRIED,
    TRIAL,
    fitting_length,
    seconds_left,
    step_seconds,
)
from trainer.readers.samples import SampleTable
from trainer.settings.config import AUTO, STRONG_PARTS, TrainConfig, resolved
from vidt.errors import UserError, counted
from vidt.images.preprocessing import Preprocessing
from vidt.losses.criterion import SetCriterion, criterion_for
from vidt.losses.distillation import TokenMatching
from vidt.losses.softmax_criterion import SoftmaxCriterion
from vidt.model.config import ViDTConfig
from vidt.model.vidt import build_detector, compile_blocks
from vidt.ops.precision import best_precision, prepare_training

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


def make_accelerator(mixed_precision: str = "auto") -> Accelerator:
    """An accelerator without trackers, in the precision of `--mixed_precision`; the launcher sets
    the processes.
    """
    use_expandable_segments()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or cpu_of_launcher():
        device = torch.device("cpu")
    precision, _ = choose_precision(mixed_precision, device)
    # Without a GPU, `cpu` must be set: otherwise every process believes that it is alone.
    try:
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision,
            # The loop splits batches itself; a number in the environment would divide the loss.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=DEVICE_PATIENCE)],
            rng_types=[],
        )
    except ValueError as error:  # such as a precision that the device does not have
        raise UserError(f"accelerate refuses the launcher's settings: {error}") from error


def choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """The precision that `--mixed_precision` stands for on a device, and why. bf16 or fp16 given to
    the launcher wins over auto; its "no" means nothing, because it says so without being asked.
    """
    of_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "auto":
        return asked, "as asked"
    if of_launcher != "no":
        return of_launcher, "as asked of the launcher"
    return best_precision(device)


def precision_line(asked: str, accelerator: Accelerator) -> str:
    """The precision of a run, and why, in a few words."""
    precision, device = accelerator.mixed_precision, accelerator.device
    if precision == "fp16" and device.type == "cpu":
        return "fp16 asked for, but a CPU computes fp32 (bf16 works)"
    chosen, reason = choose_precision(asked, device)
    name = "fp32" if precision == "no" else precision
    return f"{name} ({reason if chosen == precision else 'as the accelerator was made'})"


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
    automatic = config.batch_size == AUTO
    if automatic:
        found = automatic_batch_size(probe, checkpoint, len(train_set), accelerator)
        config = replace(config, batch_size=found)
    step_images = config.batch_size * accelerator.num_processes
    shown = images_of_epoch(config, train_set)
    per_epoch = steps_per_epoch(shown, step_images)
    n_iter_to_acc = config.n_iter_to_acc
    if probe.possible() and checkpoint is None and not automatic:  # else it has been tried
        n_iter_to_acc = fitting_micro_batches(probe, config, n_iter_to_acc)
    if config.hours is not None:
        config = within_hours(
            config,
            config.hours,
            checkpoint,
            per_epoch,
            len(val_set),
            test_images,
            n_iter_to_acc,
            dataset,
            learn,
            optimizer,
            accelerator,
            agreement,
        )
    total_steps = config.epochs * per_epoch
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)
    if ema is not None and config.ema_decay == AUTO:
        ema.decay = automatic_ema_decay(checkpoint, total_steps)
        config = replace(config, ema_decay=ema.decay)
    epochs = total_steps / per_epoch
    strong = int(epochs) - config.plain_epochs if config.plain_epochs else math.ceil(epochs)
    dataset.strong_epochs = max(strong, 0)
    state = RunState(
        n_iter_to_acc=n_iter_to_acc,
        step_images=step_images,
        dataset=train_set.fingerprint(),
        settings=resolved(config, model_fields),
    )
    line = strong_line(dataset, math.ceil(epochs), model_config)
    if line:
        logger.info(line)
    if checkpoint is not None:
        state = restore(checkpoint, state, model, ema, optimizer, accelerator)
        if probe.possible():
            state.n_iter_to_acc = fitting_micro_batches(probe, config, state.n_iter_to_acc)
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


def strong_line(dataset: DetectionDataset, total_epochs: int, model: ViDTConfig) -> str:
    """A line on the strong parts of the augmentation; empty if there are none."""
    on = dataset.augmentation.strong.on
    if not on:
        return ""
    parts = ", ".join(f"--{name} {probability:g}" for name, probability in on.items())
    strong = min(int(dataset.strong_epochs), total_epochs)
    line = f"augmentation: {parts} in the first {counted(strong, 'epoch')} of {total_epochs}"
    if dataset.most_boxes > max(int(dataset.samples.box_counts.max()), model.det_token_num):
        line += (
            f"; an image may get {dataset.most_boxes} boxes, more than --det_token_num "
            f"{model.det_token_num} can predict"
        )
    return line


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


def within_hours(
    config: TrainConfig,
    hours: float,
    checkpoint: Checkpoint | None,
    per_epoch: int,
    val_images: int,
    test_images: int,
    n_iter_to_acc: int,
    dataset: DetectionDataset,
    learn: Callable[..., dict[str, Tensor] | None],
    optimizer: Optimizer,
    accelerator: Accelerator,
    agreement: Agreement,
) -> TrainConfig:
    """The settings with the length that `--hours` stands for: that of the checkpoint, else what a
    trial finds, at most --max_steps. Intervals other than the defaults stay. Raises UserError if
    not even one step fits.
    """
    if checkpoint is not None:
        saved = checkpoint.state.settings
        names = ("epochs", "max_steps", "eval_interval", "save_interval")
        logger.info(f"--hours {hours:g}: {counted(saved['epochs'], 'epoch')}, as in the checkpoint")
        return replace(config, **{name: saved[name] for name in names})

    def left() -> float:
        return agreement.gather(seconds_left(hours)).min().item()

    batches = micro_batches(dataset, config, n_iter_to_acc, range(MOST_TRIED), accelerator)
    step = step_seconds(
        learn,
        batches,
        n_iter_to_acc,
        optimizer,
        TRIAL * left(),
        lambda own: agreement.gather(own).max().item(),
    )
    images = config.batch_size * accelerator.num_processes
    length = fitting_length(left(), step, per_epoch, images, val_images, test_images)
    steps = min(length.max_steps, config.max_steps or length.max_steps)
    intervals: dict[str, Any] = {
        name: length.eval_interval
        for name in ("eval_interval", "save_interval")
        if getattr(config, name) == getattr(TrainConfig, name)
    }
    config = replace(config, epochs=length.epochs, max_steps=steps, **intervals)
    logger.info(
        f"--hours {hours:g}: a step takes {step:.3g} s, so {counted(steps, 'step')} "
        f"({counted(length.epochs, 'epoch')}) fit, with an evaluation every "
        f"{counted(config.eval_interval, 'epoch')}"
    )
    return config


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
    --contrastive_denoising without --denoising. Warns of other settings that do nothing.
    """
    if config.contrastive_denoising and not config.denoising:
        raise UserError("--contrastive_denoising needs --denoising, which is 0; drop it")
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
    if config.denoising and not model.with_box_refine:
        raise UserError("--denoising needs --with_box_refine: its queries start from boxes")
    if config.denoising and (model.method != "vidt" or not model.dec_layers):
        flags = f"--method {model.method} --dec_layers {model.dec_layers}"
        raise UserError(f"--denoising needs a decoder; {flags} has none")


def find_checkpoint(config: TrainConfig, agreement: Agreement) -> Checkpoint | None:
    """The checkpoint to resume from, the same on every process; None for a fresh run.

    A run that the output folder already holds, and that this one does not continue, is moved aside.
    Raises UserError if --resume names a folder without an intact checkpoint.
    """
    if config.resume is None:
        set_aside(config, agreement)
        return None
    wanted = Path(config.output_dir if config.resume == "auto" else config.resume)
    on_main: list[Checkpoint] = []

    def find() -> tuple[Path | None, list[str]]:
        checkpoint, skipped = resume.find(wanted)
        if checkpoint is None:
            return None, skipped
        on_main.append(checkpoint)
        return checkpoint.path, skipped

    path, skipped = agreement.on_main(find)
    for line in skipped:
        logger.warning(f"skipped: {line}")
    if path is None and (skipped or config.resume != "auto"):
        raise UserError(
            f"--resume {wanted}: there is no intact checkpoint; leave --resume out to start anew"
        )
    if path is None:
        logger.info(f"nothing to resume in {wanted}: a fresh run")
        return None
    output = Path(config.output_dir).resolve()
    if path.parent.resolve() != output / resume.CHECKPOINTS:  # of another folder's run
        if output in path.resolve().parents and resume.checkpoints(output / resume.CHECKPOINTS):
            raise UserError(
                f"--resume {wanted} lies inside --output_dir {config.output_dir}, which holds a "
                "run of its own; name another --output_dir"
            )
        set_aside(config, agreement)
        agreement.on_main(lambda: resume.bring_best(on_main[0], output))
    return on_main[0] if on_main else resume.load(path)


def set_aside(config: TrainConfig, agreement: Agreement) -> None:
    """Moves the run that the output folder holds, if any, into its folder `earlier`."""
    aside = agreement.on_main(lambda: resume.set_aside(Path(config.output_dir)))
    if aside is not None:
        logger.warning(
            f"{config.output_dir} already holds a run, which this one does not continue. The "
            f"earlier run was moved to {aside} and replaced any run stored there; to continue it "
            f"pass --resume --output_dir {aside}"
        )


def restore(
    checkpoint: Checkpoint,
    fresh: RunState,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Optimizer,
    accelerator: Accelerator,
) -> RunState:
    """Restores all tensors of a checkpoint and returns its state with this run's settings.

    Raises UserError for another architecture, dataset or batch size, or another --ema.
    """
    state = checkpoint.state
    for line in resume.changed_settings(state, fresh):
        logger.warning(line)
    resume.restore_tensors(checkpoint.tensors, model, ema, optimizer)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    asked = ("batch_size", "n_iter_to_acc")
    if any(state.settings.get(name) != fresh.settings[name] for name in asked):
        state.n_iter_to_acc = fresh.n_iter_to_acc  # else keep the number that fitted into memory
    state.stopped_early = state.stops_early(fresh.settings["patience"])
    state.settings = fresh.settings
    return state
