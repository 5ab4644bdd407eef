"""The main job: `accelerate launch trainer/train.py`. One straight line from settings to a
detector.

Order of initialisation: process group, datasets, seed, model (random; then a checkpoint to resume,
or --load_from, or the ImageNet body), average of the weights, optimiser, loop.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, set_seed
from accelerate.utils.memory import clear_device_cache
from torch import nn

from trainer.data.load import read_datasets, read_validation, told
from trainer.data.loader import Augmentation, DetectionDataset, steps_per_epoch
from trainer.loop import resume as checkpoints
from trainer.loop.agreement import PATIENCE, Agreement, sum_gradients
from trainer.loop.clock import Clock
from trainer.loop.execution import checkpoint_activations, compiled, compiled_canvas
from trainer.loop.history import history
from trainer.loop.launch_check import refuse_split_models, require_processes
from trainer.loop.loss_log import LossLog, NonFiniteLoss
from trainer.loop.optim import learning_rate, make_ema, make_optimizer, set_learning_rate
from trainer.loop.resume import RunState
from trainer.loop.start import (
    find_checkpoint,
    load_detector,
    load_start,
    load_teacher,
    require_files,
    restore,
)
from trainer.loop.step import agree_on, check_readable, gradients, micro_batches, smaller_portions
from trainer.loop.stopping import Stopped, StopRequest
from trainer.readers.findings import format_findings
from trainer.readers.samples import SampleTable
from trainer.report.console import Console, score_table
from trainer.report.page import PAGE_NAME, page_of_training, write_evaluation_page
from trainer.report.pictures import compare, comparisons, save_picture, truth_beside_prediction
from trainer.report.progress import CsvLog, Progress, Report, TensorBoard, fan_out
from trainer.report.worst_pictures import worst_pictures
from trainer.scoring.evaluation import Evaluation, Interrupted, evaluate
from trainer.settings.config import WEIGHTS_OWN, TrainConfig, parse_or_exit, resolved, write_yaml
from trainer.settings.wording import counted
from vidt.errors import UserError
from vidt.images.preprocessing import Preprocessing
from vidt.losses.criterion import criterion_for
from vidt.model.config import ViDTConfig
from vidt.model.vidt import build_detector
from vidt.weights.checkpoint import WeightsInfo, save_weights

logger = get_logger(__name__)


def train(
    config: TrainConfig,
    model_fields: Mapping[str, Any],
    train_set: SampleTable,
    val_set: SampleTable,
    report: Report = lambda progress: None,
    *,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Trains a detector and returns the metrics of its best evaluation (keys as in
    `trainer.report.progress`).

    train_set and val_set share their class names; model_fields are those of `ViDTConfig`. report is
    called on the main process only. Writes `best.safetensors`, `last.safetensors`, `checkpoints/`,
    `predictions.jpg` and `config.yaml` into `config.output_dir`.

    Raises UserError for what a user can mend, NonFiniteLoss, and Stopped after SIGTERM or SIGINT
    once all is saved.
    """
    accelerator = accelerator or make_accelerator()
    agreement = Agreement(accelerator)
    output = Path(config.output_dir)
    root = output / checkpoints.CHECKPOINTS
    set_seed(config.seed)

    class_names = train_set.class_names
    model_config = ViDTConfig(**{**model_fields, "num_classes": len(class_names)})
    preprocessing = Preprocessing(eval_size=config.eval_size)
    if config.denoising and not model_config.with_box_refine:
        raise UserError("--denoising needs --with_box_refine: its queries start from boxes")
    if config.denoising and (model_config.method != "vidt" or not model_config.dec_layers):
        none = f"--method {model_config.method} --dec_layers {model_config.dec_layers}"
        raise UserError(f"--denoising needs a decoder; {none} has none")
    detector = build_detector(model_config)
    resumed_from = find_checkpoint(config, agreement)
    if resumed_from is None:
        load_start(detector, config, class_names, agreement)
    teacher = load_teacher(config, model_config, accelerator, agreement)
    ema = make_ema(detector, config.ema_decay).to(accelerator.device) if config.ema else None
    if config.activation_checkpointing:
        checkpoint_activations(detector)
    # Prepared "for evaluation", which leaves DistributedDataParallel out: see `sum_gradients`.
    model: nn.Module = accelerator.prepare_model(detector, evaluation_mode=True).train()
    in_steps = compiled(model) if config.compile else model  # evaluation has too many shapes
    parameters = list(model.parameters())
    scaled = accelerator.scaler is not None
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config, scaled=scaled))
    criterion = criterion_for(model_config)

    step_images = config.batch_size * accelerator.num_processes
    per_epoch = steps_per_epoch(len(train_set), step_images)
    total_steps = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    clock = Clock(per_epoch, total_steps, step_images, len(val_set), config.eval_interval)
    state = RunState(
        n_iter_to_acc=config.n_iter_to_acc,
        step_images=step_images,
        dataset=train_set.fingerprint(),
        settings=resolved(config, model_fields),
    )
    if resumed_from is not None:
        state = restore(resumed_from, state, model, ema, optimizer, accelerator)
    dataset = DetectionDataset(
        train_set,
        Augmentation.from_config(config),
        preprocessing,
        seed=config.seed,
        denoising_queries=config.denoising,
    )

    def say(event: str, metrics: Mapping[str, float] | None = None, **more: Any) -> None:
        if accelerator.is_main_process:
            moment = {
                "fraction": clock.fraction(state.step, float(state.evaluated_step == state.step)),
                "epoch": clock.epoch(state.step),
                "step": state.step,
                "total_steps": total_steps,
                "total_epochs": config.epochs,
                "metrics": metrics or {},
            }
            report(Progress(event=event, **{**moment, **more}))  # type: ignore[arg-type]

    def save_state() -> None:
        if accelerator.is_main_process:
            if accelerator.scaler is not None:
                state.scaler = accelerator.scaler.state_dict()
            tensors = checkpoints.tensors_of(model, ema, optimizer)
            path = checkpoints.save(root, state, tensors, keep=config.keep)
            say("saved", message=f"saved {path}")

    def evaluate_and_note(stop: StopRequest) -> None:
        say("evaluating")
        evaluation = evaluate(
            model if ema is None else ema.module,
            val_set,
            preprocessing,
            accelerator,
            agreement,
            batch_size=config.eval_batch_size or config.batch_size,
            num_workers=config.num_workers,
            tick=lambda done: say("evaluating", fraction=clock.fraction(state.step, done)),
            stop=lambda: stop.signum,
        )
        best = state.note_evaluation(evaluation.metrics)
        state.stopped_early = 0 < config.patience <= state.stale_evaluations
        if accelerator.is_main_process:
            weights = (model if ema is None else ema.module).state_dict()
            training = history(config, train_set, val_set, clock, state.step)
            info = WeightsInfo(
                model_config, class_names, preprocessing, evaluation.metrics, training
            )
            save_weights(output / "last.safetensors", weights, info)
            if best:
                save_weights(output / "best.safetensors", weights, info)
            pairs = comparisons(val_set, evaluation.detections, evaluation.masks)
            drawn = [compare(pair, class_names) for pair in pairs]
            if pairs:
                overview = truth_beside_prediction(pairs, class_names, drawn)
                save_picture(overview, output / "predictions.jpg")
            say(
                "evaluation",
                evaluation.metrics,
                weights=output / "last.safetensors",
                best=best,
                pictures=drawn,
                diagnosis=evaluation.diagnosis,
                worst=worst_pictures(val_set, evaluation.diagnosis.worst),
                message=unreadable_message(evaluation),
            )

    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        checkpoints.sweep(root)
        write_yaml(output / "config.yaml", config, model_fields)
    say("start", message=describe(accelerator, config, clock, state))
    losses = LossLog(agreement, output, step_images=step_images)
    batches: Iterator[dict[str, Any]] | None = None
    with StopRequest() as stop:
        while True:
            # Here the weights are those after `state.step` steps, trained or restored.
            if clock.evaluation_due(state.step) and state.evaluated_step != state.step:
                try:
                    evaluate_and_note(stop)
                except Interrupted as interrupted:
                    save_state()
                    raise Stopped(interrupted.signum) from None
            over = state.stopped_early or state.step >= total_steps
            if state.saved_step != state.step and (over or clock.save_due(state.step, config)):
                state.saved_step = state.step
                save_state()
            if over:
                break
            if batches is None:
                steps = range(state.step, total_steps)
                batches = micro_batches(dataset, config, state.n_iter_to_acc, steps, accelerator)
            window = [next(batches) for _ in range(state.n_iter_to_acc)]
            num_boxes, canvas, signum = agree_on(window, stop.signum, agreement)
            if config.compile:
                canvas = compiled_canvas(canvas, config.eval_size, dataset.augmentation.max_size)
            if signum:
                losses.check()
                save_state()
                raise Stopped(signum)

            rate = learning_rate(state.step, total_steps, config)
            set_learning_rate(optimizer, rate)
            # All that is random in a step follows from its number: there is nothing to save.
            set_seed(step_seed(config.seed, state.step, accelerator.process_index))
            terms = gradients(
                *(in_steps, criterion, accelerator, window, canvas, num_boxes, teacher),
                denoising_queries=config.denoising,
            )
            if agreement.any(terms is None):
                # On every process: free the memory, and take the same images in smaller portions.
                optimizer.zero_grad()
                window, batches = [], None
                clear_device_cache(garbage_collection=True)
                state.n_iter_to_acc = smaller_portions(config, state.n_iter_to_acc, canvas)
                continue
            sum_gradients(parameters, accelerator.num_processes)
            norm = accelerator.clip_grad_norm_(parameters, config.clip_max_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.optimizer_step_was_skipped:
                state.skipped_updates += 1
                norm = torch.zeros_like(norm)  # fp16 overflowed; the weights are as they were
            elif ema is not None:
                ema.update(model, step=state.step - state.skipped_updates)
            image_ids = [target["image_id"] for batch in window for target in batch["targets"]]
            losses.add(state.step, terms or {}, norm, image_ids)
            state.step += 1
            if state.step % config.log_interval == 0 or clock.pause_due(state.step, config):
                say("step", {**losses.check(), "lr": rate})
                check_readable(dataset, config.max_bad_fraction, agreement)
    metrics = {**state.best_metrics, "best_epoch": float(clock.epoch(state.best_step))}
    say("end", metrics, fraction=1.0, weights=output / "best.safetensors", message=closing(state))
    return state.best_metrics


def make_accelerator() -> Accelerator:
    """No tracker, no telemetry; processes and precision come from the launcher."""
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    # Processes without an accelerator must be told so, or each believes that it is alone.
    cpu = not torch.accelerator.is_available()
    loading = DataLoaderConfiguration(non_blocking=True)
    return Accelerator(cpu=cpu, dataloader_config=loading, kwargs_handlers=[patient], rng_types=[])


def step_seed(seed: int, step: int, process: int) -> int:
    """For dropout and drop path: another one for each step and process."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


def describe(accelerator: Accelerator, config: TrainConfig, clock: Clock, state: RunState) -> str:
    """One line on what is about to run, and where."""
    start = f"resumed at step {state.step}" if state.step else "from step 0"
    precision = accelerator.mixed_precision
    if precision == "fp16" and accelerator.device.type == "cpu":
        precision = "fp16 asked for, but a CPU computes fp32 (bf16 works)"
    return (
        f"{start} to {clock.total_steps} ({clock.per_epoch} per epoch), "
        f"{counted(clock.step_images, 'image')} a step on {accelerator.num_processes} x "
        f"{accelerator.device.type}, precision {precision}; results in {config.output_dir}"
    )


def unreadable_message(evaluation: Evaluation) -> str:
    gone = counted(evaluation.unreadable, "validation image")
    return f"{gone} can no longer be read: nothing found" if evaluation.unreadable else ""


def closing(state: RunState) -> str:
    if state.stopped_early:
        since = counted(state.stale_evaluations, "evaluation")
        return f"stopped early: no better map50 in {since}"
    return f"done after {counted(state.step, 'step')}"


def train_from_settings(
    config: TrainConfig, model_fields: dict[str, Any], accelerator: Accelerator
) -> None:
    """Reads and checks the data on the main process, shares it, trains, and shows the run."""
    agreement = Agreement(accelerator)
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file; name a folder")
    if not config.check:
        agreement.on_main(lambda: require_files(config))
    train_set, val_set = agreement.on_main(lambda: checked_datasets(config, model_fields))
    if config.check:
        return
    names = (
        "best.safetensors",
        "last.safetensors",
        "predictions.jpg",
        "metrics.csv",
        "config.yaml",
        PAGE_NAME,
    )
    with contextlib.ExitStack() as open_files:
        reports: list[Report] = []
        if accelerator.is_main_process:
            console = Console(files={Path(name).stem: output / name for name in names})
            events = TensorBoard(Path(config.tensorboard_dir or output / "tensorboard"))
            page = page_of_training(config, model_fields, train_set, val_set, accelerator)
            for each in (console, events, page):
                open_files.callback(each.close)
            # The page is made from metrics.csv, and the console names it in the end.
            reports = [CsvLog(output / "metrics.csv"), events, page, console]
        report = fan_out(*reports)
        train(config, model_fields, train_set, val_set, report, accelerator=accelerator)


def checked_datasets(
    config: TrainConfig, model_fields: Mapping[str, Any]
) -> tuple[SampleTable, SampleTable]:
    """Both splits; findings go to the log and, at greater length, to `findings.csv`."""
    return told(
        Path(config.output_dir),
        lambda: read_datasets(
            config,
            num_queries=model_fields["det_token_num"],
            num_classes=model_fields["num_classes"],
            masks=model_fields["with_vector"],
            token_label=model_fields["token_label"],
        ),
    )


def evaluate_only(
    config: TrainConfig, model_fields: dict[str, Any], accelerator: Accelerator
) -> None:
    """`--eval --load_from FILE`: the COCO numbers of a weights file. What the file says of its
    architecture, classes and preprocessing counts; of the flags only --eval_size and --dec_layers,
    where given.
    """
    if config.load_from is None:
        raise UserError("--eval needs --load_from FILE, the weights to evaluate")
    agreement = Agreement(accelerator)
    model, info = load_detector(config.load_from, agreement, model_fields["dec_layers"])
    preprocessing = info.preprocessing
    if config.eval_size not in (WEIGHTS_OWN, preprocessing.eval_size):
        logger.warning(
            f"{config.load_from} was trained for --eval_size {preprocessing.eval_size}; "
            f"this evaluates it at {config.eval_size}"
        )
        preprocessing = replace(preprocessing, eval_size=config.eval_size)
    val_set, findings = agreement.on_main(
        lambda: read_validation(config, info.class_names, masks=info.config.with_vector)
    )
    if findings:
        logger.info(format_findings(findings))
    began = time.monotonic()
    evaluation = evaluate(
        accelerator.prepare_model(model, evaluation_mode=True),
        val_set,
        preprocessing,
        accelerator,
        agreement,
        batch_size=config.eval_batch_size or config.batch_size,
        num_workers=config.num_workers,
    )
    logger.info(score_table(evaluation.metrics))
    if accelerator.is_main_process:
        output = Path(config.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / "evaluation.json").write_text(json.dumps(evaluation.metrics, indent=1))
        config = replace(config, eval_size=preprocessing.eval_size)
        seconds = time.monotonic() - began
        write_evaluation_page(
            config, info.config, val_set, findings, evaluation, accelerator, seconds
        )


def fail(message: str, code: int) -> None:
    # The last line of a loader process's failure says what, those before it where.
    line = message.strip().rpartition("\n")[2]
    sys.stderr.write(f"{line}\n" if code >= 128 else f"error: {line}\n")
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit codes: 0 done, 2 a user's error, 3 the loss is not finite, 130 and 143
    stopped by SIGINT and SIGTERM with everything saved.
    """
    config, model_fields = parse_or_exit(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("trainer", "vidt", "__main__"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        refuse_split_models()
        accelerator = make_accelerator()
        require_processes(accelerator.num_processes)
        run = evaluate_only if config.eval else train_from_settings
        run(config, model_fields, accelerator)
    except (UserError, OSError) as error:
        fail(str(error), 2)
    except torch.OutOfMemoryError as error:
        first = str(error).strip().partition("\n")[0]
        fail(f"{first} Lower --batch_size or --eval_size; --resume goes on from the last save", 2)
    except NonFiniteLoss as error:
        fail(str(error), 3)
    except Stopped as stopped:
        fail(f"{stopped}; everything is saved, go on with --resume", stopped.exit_code)
    accelerator.end_training()


if __name__ == "__main__":
    main()
