"""What a run writes and reports: its folder, evaluations, weights, checkpoints."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from accelerate.logging import get_logger
from torch import nn

from trainer.augmentation.preview import PREVIEW_NAME, PREVIEWED, preview
from trainer.data.loader import training_order
from trainer.loop import resume
from trainer.loop.clock import training_record
from trainer.loop.launch import precision_line
from trainer.loop.set_up import Run
from trainer.loop.start import load_detector
from trainer.loop.stopping import StopRequest
from trainer.readers.samples import SampleTable
from trainer.report.console import score
from trainer.report.pictures import compare, comparisons, save_picture, truth_beside_prediction
from trainer.report.progress import Event, Progress, Report
from trainer.report.worst_pictures import worst_pictures
from trainer.scoring.evaluation import Evaluation, evaluate
from trainer.settings.parsing import write_yaml
from vidt.atomic import atomic_write
from vidt.errors import counted
from vidt.weights.weights_file import WeightsInfo, save_weights

logger = get_logger(__name__)

Say: TypeAlias = Callable[..., None]  # `announce` for a given run and report


def announce(
    run: Run, report: Report, event: Event, metrics: Mapping[str, float] | None = None, **more: Any
) -> None:
    """Reports an event of the run, on the main process only."""
    if run.accelerator.is_main_process:
        state, clock = run.state, run.clock
        moment = {
            "fraction": clock.fraction(state.step, float(state.evaluated_step == state.step)),
            "epoch": clock.epoch(state.step),
            "step": state.step,
            "total_steps": clock.total_steps,
            "total_epochs": run.config.epochs,
            "metrics": metrics or {},
        }
        report(Progress(event=event, **{**moment, **more}))


def begin_folder(run: Run, model_fields: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Writes what the folder has from the start on, and removes what is left of earlier starts."""
    output = Path(run.config.output_dir)
    resume.sweep(output / resume.CHECKPOINTS)
    write_yaml(output / "config.yaml", run.config, model_fields)
    (output / resume.NON_FINITE).unlink(missing_ok=True)
    for name in () if run.state.step else resume.NOT_OF_EVERY_RUN:
        (output / name).unlink(missing_ok=True)
    save_preview(run, class_names)


def save_preview(run: Run, class_names: Sequence[str]) -> None:
    """Draws the images of the first steps of this start, if any strong part of the augmentation is
    on or --preview asks for it.
    """
    config, dataset, clock = run.config, run.dataset, run.clock
    steps = range(run.state.step, clock.total_steps)
    if not steps or not (dataset.augmentation.strong.on or config.preview):
        return
    order = training_order(dataset, config, clock.step_images, clock.step_images, steps)
    keys = islice(chain.from_iterable(order), PREVIEWED)
    picture = preview((dataset[key] for key in keys), class_names)
    for folder in {Path(config.output_dir), Path(config.preview or config.output_dir)}:
        folder.mkdir(parents=True, exist_ok=True)
        save_picture(picture, folder / PREVIEW_NAME)
        logger.info(f"the first augmented images: {folder / PREVIEW_NAME}")


def evaluate_and_save(
    run: Run,
    train_set: SampleTable,
    val_set: SampleTable,
    say: Say,
    stop: StopRequest,
) -> None:
    """Does what is due after `run.state.step` steps: an evaluation, after which it saves the
    weights, and a checkpoint. Raises Stopped if a signal interrupts the evaluation.
    """
    state, config = run.state, run.config
    if run.clock.evaluation_due(state.step) and state.evaluated_step != state.step:
        say("evaluating")
        evaluation = evaluate_in(
            run,
            run.evaluated_model,
            val_set,
            tick=lambda done: say("evaluating", fraction=run.clock.fraction(state.step, done)),
            stop=stop,
        )
        best = state.note_evaluation(evaluation.metrics)
        state.stopped_early = state.stops_early(config.patience)
        if run.accelerator.is_main_process:
            save_evaluation(run, train_set, val_set, evaluation, best, say)
    over = state.stopped_early or state.step >= run.clock.total_steps
    if state.saved_step != state.step and (over or run.clock.save_due(state.step, config)):
        state.saved_step = state.step  # first, because the checkpoint records it
        save_checkpoint(run, say)


def evaluate_in(
    run: Run,
    model: nn.Module,
    samples: SampleTable,
    *,
    tick: Callable[[float], None],
    stop: StopRequest,
) -> Evaluation:
    """`evaluate` with the settings of the run. Raises Stopped if a signal interrupts it."""
    config = run.config
    return evaluate(
        model,
        samples,
        run.dataset.preprocessing,
        run.accelerator,
        run.agreement,
        batch_size=config.eval_batch_size or config.batch_size,
        num_workers=config.num_workers,
        tick=tick,
        stop=lambda: stop.signum,
    )


def save_evaluation(
    run: Run,
    train_set: SampleTable,
    val_set: SampleTable,
    evaluation: Evaluation,
    best: bool,
    say: Say,
) -> None:
    """Saves and reports the weights that were evaluated, and pictures of their predictions."""
    output, class_names = Path(run.config.output_dir), train_set.class_names
    weights = run.evaluated_model.state_dict()
    record = training_record(run.config, train_set, val_set, run.clock, run.state.step)
    preprocessing = run.dataset.preprocessing
    thresholds = evaluation.diagnosis.thresholds
    info = WeightsInfo(
        run.model_config, class_names, preprocessing, evaluation.metrics, record, thresholds
    )
    save_weights(output / "last.safetensors", weights, info)
    if best:
        save_weights(output / "best.safetensors", weights, info)
    pairs = comparisons(val_set, evaluation.detections, evaluation.masks)
    pictures = [compare(pair, class_names) for pair in pairs]
    if pairs and best:
        overview = truth_beside_prediction(pairs, class_names, pictures)
        save_picture(overview, output / "predictions.jpg")
    unread = counted(evaluation.unreadable, "validation image")
    say(
        "evaluation",
        evaluation.metrics,
        weights=output / "last.safetensors",
        best=best,
        pictures=pictures,
        diagnosis=evaluation.diagnosis,
        worst=worst_pictures(val_set, evaluation.diagnosis.worst),
        message=f"{unread} can no longer be read: no detections" if evaluation.unreadable else "",
    )


def evaluate_test(run: Run, test_set: SampleTable, say: Say, stop: StopRequest) -> dict[str, float]:
    """Evaluates the best weights on the test part, writes `test.json` and returns the metrics, as
    `test_map50` and so on. Raises Stopped if a signal interrupts it.
    """
    output = Path(run.config.output_dir)
    model, _ = load_detector(str(output / resume.BEST), run.agreement)
    evaluation = evaluate_in(
        run,
        run.accelerator.prepare_model(model, evaluation_mode=True),
        test_set,
        tick=lambda done: say("evaluating"),
        stop=stop,
    )
    metrics = {f"test_{name}": value for name, value in evaluation.metrics.items()}
    if run.accelerator.is_main_process:
        atomic_write(output / resume.TEST, json.dumps(metrics, indent=1).encode())
        numbers = ", ".join(f"{name} {score(metrics[name])}" for name in ("test_map50", "test_map"))
        images = counted(len(test_set), "image")
        say("saved", message=f"best weights on {test_set.source}, {images}: {numbers}")
    return metrics


def save_checkpoint(run: Run, say: Say) -> None:
    """Saves what `--resume` needs, on the main process only."""
    if run.accelerator.is_main_process:
        if run.accelerator.scaler is not None:
            run.state.scaler = run.accelerator.scaler.state_dict()
        root = Path(run.config.output_dir) / resume.CHECKPOINTS
        tensors = resume.tensors_of(run.model, run.ema, run.optimizer)
        path = resume.save(root, run.state, tensors, keep=run.config.keep)
        say("saved", message=f"saved {path}")


def start_line(run: Run) -> str:
    """One line on where the run starts and what it runs on."""
    step, clock, accelerator = run.state.step, run.clock, run.accelerator
    start = f"resumed at step {step}" if step else "from step 0"
    precision = precision_line(run.config.mixed_precision, accelerator)
    return (
        f"{start} to {clock.total_steps} ({clock.per_epoch} per epoch), "
        f"{counted(clock.step_images, 'image')} a step on {accelerator.num_processes} x "
        f"{accelerator.device.type}, precision {precision}; results in {run.config.output_dir}"
    )


def end_line(run: Run) -> str:
    if run.state.stopped_early:
        since = counted(run.state.stale_evaluations, "evaluation")
        return f"stopped early: no better {run.config.best_by} in {since}"
    return f"done after {counted(run.state.step, 'step')}"
