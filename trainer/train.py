"""The main job, `accelerate launch trainer/train.py`: from settings to a trained detector.

`main` reads the settings, `train_from_settings` the data; `train` is the loop.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from trainer.augmentation.preview import PREVIEW_NAME, PREVIEWED, preview
from trainer.data.dataset_statistics import plan_of, sizes_of_plan
from trainer.data.load import Datasets, read_and_log_parts, read_parts, read_validation
from trainer.data.loader import training_order
from trainer.loop import resume
from trainer.loop.agreement import Agreement
from trainer.loop.clock import training_record
from trainer.loop.launch_check import refuse_silent_cpu, refuse_split_models, require_processes
from trainer.loop.loss_log import LossLog, NonFiniteLoss
from trainer.loop.optim import learning_rate, set_learning_rate
from trainer.loop.run_lock import only_run_in
from trainer.loop.set_up import Run, make_accelerator, precision_line, set_up
from trainer.loop.start import load_detector, require_files, settled
from trainer.loop.step import check_readable, report_wait, train_step
from trainer.loop.stopping import INTERRUPTED, Stopped, StopRequest, sigterm_interrupts
from trainer.readers.findings import format_findings
from trainer.readers.samples import SampleTable
from trainer.report.console import Console, PrintableFormatter, score, score_table
from trainer.report.page import PAGE_NAME, page_of_training, write_evaluation_page
from trainer.report.pictures import compare, comparisons, save_picture, truth_beside_prediction
from trainer.report.progress import (
    TENSORBOARD,
    CsvLog,
    Event,
    Progress,
    Report,
    TensorBoard,
    Trackers,
    fan_out,
    require_trackers,
)
from trainer.report.worst_pictures import worst_pictures
from trainer.scoring.evaluation import Evaluation, evaluate
from trainer.settings.config import (
    WEIGHTS_OWN,
    TrainConfig,
    fixed_settings,
    parse_or_exit,
    resolved,
    write_yaml,
)
from vidt.atomic import atomic_write
from vidt.errors import UserError, counted, escaped
from vidt.weights.weights_file import WeightsInfo, save_weights

logger = get_logger(__name__)

Say: TypeAlias = Callable[..., None]  # `announce` for a given run and report


def train(
    config: TrainConfig,
    model_fields: Mapping[str, Any],
    train_set: SampleTable,
    val_set: SampleTable,
    report: Report = lambda progress: None,
    *,
    accelerator: Accelerator | None = None,
    test_set: SampleTable | None = None,
) -> dict[str, float]:
    """Trains a detector and returns the metrics of its best evaluation (keys as in
    `trainer.report.progress`), and with a test_set those of the best weights on it, as `test_map50`
    and so on.

    All sets share their class names; model_fields are those of `ViDTConfig`. The main process alone
    calls report. Writes `best.safetensors`, `last.safetensors`, `checkpoints/`, `predictions.jpg`,
    `config.yaml` and with a test_set `test.json` into `config.output_dir`.

    Raises UserError, NonFiniteLoss, and, after SIGTERM or SIGINT once everything is saved, Stopped.
    """
    accelerator = accelerator or make_accelerator(config.mixed_precision)
    agreement = Agreement(accelerator)
    with only_run_in(Path(config.output_dir), agreement):
        sets = train_set, val_set, test_set
        return _train(config, model_fields, *sets, report, accelerator, agreement)


def _train(
    config: TrainConfig,
    model_fields: Mapping[str, Any],
    train_set: SampleTable,
    val_set: SampleTable,
    test_set: SampleTable | None,
    report: Report,
    accelerator: Accelerator,
    agreement: Agreement,
) -> dict[str, float]:
    """`train`, in a folder that no other run uses."""
    test_images = 0 if test_set is None else len(test_set)
    run = set_up(
        config,
        model_fields,
        train_set,
        val_set,
        accelerator,
        agreement,
        test_images=test_images,
    )
    config = run.config  # with the batch size that `auto` stands for
    state, clock, output = run.state, run.clock, Path(config.output_dir)
    agreement.on_main(lambda: begin_folder(run, model_fields, train_set.class_names))
    say = partial(announce, run, report)
    say("start", message=start_line(run))
    losses = LossLog(run.agreement, output, step_images=clock.step_images)

    with StopRequest() as stop:
        try:
            # A resumed run may have been killed before the evaluation or checkpoint of its step.
            evaluate_and_save(run, train_set, val_set, say, stop)
            for step in range(state.step, clock.total_steps):
                if state.stopped_early:
                    break
                rate = learning_rate(step, clock.total_steps, config)
                set_learning_rate(run.optimizer, rate)
                terms, norm, image_ids = train_step(run, stop)
                losses.add(step, terms, norm, image_ids)
                if state.step % config.log_interval == 0 or clock.pause_due(state.step, config):
                    say("step", {**losses.check(), **report_wait(run), "lr": rate})
                    check_readable(run.dataset, config.max_bad_fraction, run.agreement)
                with losses.paused():
                    evaluate_and_save(run, train_set, val_set, say, stop)
            on_test = {} if test_set is None else evaluate_test(run, test_set, say, stop)
        except Stopped:
            losses.check()
            # Not a due save: the resumed run still owes this step's evaluation and checkpoint.
            save_checkpoint(run, say)
            raise

    best = {**state.best_metrics, **on_test}
    metrics = {**best, "best_epoch": float(clock.epoch(state.best_step))}
    say("end", metrics, fraction=1.0, weights=output / "best.safetensors", message=end_line(run))
    return best


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
    if pairs:
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


def train_from_settings(
    config: TrainConfig,
    model_fields: dict[str, Any],
    accelerator: Accelerator,
    fixed: Collection[str] = (),
) -> None:
    """Reads and checks the data on the main process, sends it to the others, trains and reports.
    fixed: the settings that `--preset auto` leaves alone.
    """
    agreement, processes = Agreement(accelerator), accelerator.num_processes
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file; name a folder")
    if config.preset == "auto":
        config, model_fields, fixed = agreement.on_main(
            lambda: settled(config, model_fields, fixed)
        )
    if config.check:
        agreement.on_main(lambda: checked_datasets(config, model_fields, fixed, processes))
        return
    agreement.on_main(lambda: require_trackers(config.report_to))
    agreement.on_main(lambda: require_files(config))
    with only_run_in(output, agreement):
        train_and_report(config, model_fields, accelerator, agreement, fixed)


def train_and_report(
    config: TrainConfig,
    model_fields: dict[str, Any],
    accelerator: Accelerator,
    agreement: Agreement,
    fixed: Collection[str],
) -> None:
    """`train` on the data of the settings, with the reports of the command line."""
    output, processes = Path(config.output_dir), accelerator.num_processes
    data: Datasets = agreement.on_main(
        lambda: checked_datasets(config, model_fields, fixed, processes)
    )
    plan = ""
    if config.preset == "auto":
        config, model_fields, plan = agreement.on_main(
            lambda: plan_of(config, model_fields, fixed, data.train, processes)
        )
        logger.info(plan)
    train_set, val_set = data.train, data.val
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
            files = {Path(name).stem: output / name for name in names}
            console = Console(files=files, best_by=config.best_by)
            trackers = Trackers(config.report_to, output, resolved(config, model_fields))
            page = page_of_training(config, model_fields, train_set, val_set, accelerator, plan)
            for each in (console, trackers, page):
                open_files.callback(each.close)
            # The page reads metrics.csv, and the console names the page at the end.
            reports = [CsvLog(output / "metrics.csv"), trackers, page, console]
            if TENSORBOARD in config.report_to:
                events = TensorBoard(Path(config.tensorboard_dir or output / "tensorboard"))
                open_files.callback(events.close)
                reports.insert(1, events)
        report = fan_out(*reports)
        train(
            config,
            model_fields,
            train_set,
            val_set,
            report,
            accelerator=accelerator,
            test_set=data.test,
        )


def checked_datasets(
    config: TrainConfig, model_fields: Mapping[str, Any], fixed: Collection[str], processes: int
) -> Datasets:
    """Reads all parts. The log summarises the findings; `findings.csv` lists them."""
    planned = config.preset == "auto"
    return read_and_log_parts(
        Path(config.output_dir),
        lambda: read_parts(
            config,
            num_queries=None if planned else model_fields["det_token_num"],
            num_classes=model_fields["num_classes"],
            masks=model_fields["with_vector"],
            token_label=model_fields["token_label"],
            sizes_of=(
                (lambda train: sizes_of_plan(config, model_fields, fixed, train, processes))
                if planned
                else None
            ),
        ),
    )


def evaluate_only(
    config: TrainConfig, model_fields: dict[str, Any], accelerator: Accelerator
) -> None:
    """`--eval --load_from FILE`: evaluates a weights file. The file determines architecture,
    classes and preprocessing; only --eval_size and --dec_layers override it.
    """
    if config.load_from is None:
        raise UserError("--eval needs --load_from FILE, the weights to evaluate")
    agreement = Agreement(accelerator)
    model, info = load_detector(
        config.load_from, agreement, model_fields["dec_layers"], allow_http=config.allow_http
    )
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
    logger.info(
        f"evaluating {counted(len(val_set), 'image')} on {accelerator.num_processes} x "
        f"{accelerator.device.type}, precision "
        f"{precision_line(config.mixed_precision, accelerator)}"
    )
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
        scores = json.dumps(evaluation.metrics, indent=1)
        atomic_write(Path(config.output_dir) / "evaluation.json", scores.encode())
        config = replace(config, eval_size=preprocessing.eval_size)
        seconds = time.monotonic() - began
        write_evaluation_page(
            config, info.config, val_set, findings, evaluation, accelerator, seconds
        )


def run_from_settings(
    config: TrainConfig, model_fields: dict[str, Any], fixed: Collection[str] = ()
) -> None:
    """One process of what the settings ask for: a training, an evaluation, or a dataset check.
    fixed: the settings that `--preset auto` leaves alone.
    """
    refuse_split_models()
    if not config.check:
        refuse_silent_cpu()
    accelerator = make_accelerator(config.mixed_precision)
    require_processes(accelerator.num_processes)
    with sigterm_interrupts():
        if config.eval:
            evaluate_only(config, model_fields, accelerator)
        else:
            train_from_settings(config, model_fields, accelerator, fixed)
    accelerator.end_training()


def fail(message: str, code: int) -> None:
    # A loader process fails with a traceback; its last line is the message.
    text = message.strip()
    line = escaped(text.rpartition("\n")[2] if text.startswith("Caught ") else text)
    sys.stderr.write(f"{line}\n" if code >= 128 else f"error: {line}\n")
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit codes: 0 done, 2 an error that the user can fix, 3 the loss is not
    finite, 130 and 143 stopped by SIGINT and SIGTERM, in the loop with everything saved. Any other
    exception keeps its traceback, exit code 1.
    """
    config, model_fields = parse_or_exit(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("trainer", "vidt", "__main__"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        fixed = fixed_settings(sys.argv[1:] if argv is None else argv)
        run_from_settings(config, model_fields, fixed)
    except (UserError, OSError) as error:
        fail(str(error), 2)
    except torch.OutOfMemoryError as error:
        first = str(error).strip().partition("\n")[0]
        remedy = "Raise --n_iter_to_acc or pass --activation_checkpointing"
        fail(f"{first} {remedy}; --resume continues from the last save", 2)
    except NonFiniteLoss as error:
        fail(str(error), 3)
    except Stopped as stopped:
        fail(f"{stopped}; everything is saved, continue with --resume", stopped.exit_code)
    except KeyboardInterrupt as stopped:  # not in the loop, or the second signal in it
        code = getattr(stopped, "exit_code", INTERRUPTED)
        fail("stopped at once; --resume continues from the last checkpoint, if there is one", code)


if __name__ == "__main__":
    main()
