"""The main job, `accelerate launch trainer/train.py`: from settings to a trained detector.

`main` reads the settings, `train_from_settings` the data; `train` is the loop.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from trainer.data.dataset_statistics import plan_of, sizes_of_plan
from trainer.data.load import Datasets, read_and_log_parts, read_parts, read_validation
from trainer.evaluate_and_save import (
    announce,
    begin_folder,
    end_line,
    evaluate_and_save,
    evaluate_test,
    save_checkpoint,
    start_line,
)
from trainer.loop.agreement import Agreement
from trainer.loop.launch import (
    make_accelerator,
    precision_line,
    refuse_silent_cpu,
    refuse_split_models,
    require_processes,
)
from trainer.loop.loss_log import LossLog, NonFiniteLoss
from trainer.loop.optim import learning_rate, set_learning_rate
from trainer.loop.run_lock import only_run_in
from trainer.loop.set_up import set_up
from trainer.loop.start import load_detector, require_files, settled
from trainer.loop.step import check_readable, report_wait, train_step
from trainer.loop.stopping import INTERRUPTED, Stopped, StopRequest, sigterm_interrupts
from trainer.readers.findings import format_findings
from trainer.readers.samples import SampleTable
from trainer.report.console import Console, PrintableFormatter, score_table
from trainer.report.page import PAGE_NAME, page_of_training, write_evaluation_page
from trainer.report.progress import (
    TENSORBOARD,
    CsvLog,
    Report,
    TensorBoard,
    Trackers,
    fan_out,
    require_trackers,
)
from trainer.scoring.evaluation import evaluate
from trainer.settings.config import TrainConfig
from trainer.settings.limits import WEIGHTS_OWN
from trainer.settings.parsing import fixed_settings, parse_or_exit
from vidt.atomic import atomic_write
from vidt.errors import UserError, counted, escaped

logger = get_logger(__name__)

NO_WEIGHTS_YET = "; no weights to predict with yet, since none were evaluated"


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
    say("start", message=start_line(run), settings=state.settings)
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
        except Stopped as stopped:
            losses.check()
            # Not a due save: the resumed run still owes this step's evaluation and checkpoint.
            save_checkpoint(run, say)
            run.agreement.gather(0)  # the first process to end would end the others
            stopped.evaluated = state.best_step >= 0
            raise

    best = {**state.best_metrics, **on_test}
    metrics = {**best, "best_epoch": float(clock.epoch(state.best_step))}
    say("end", metrics, fraction=1.0, weights=output / "best.safetensors", message=end_line(run))
    return best


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
    if config.preset == "auto":
        config, model_fields, fixed = agreement.on_main(
            lambda: settled(config, model_fields, fixed)
        )
    if config.check:
        with only_run_in(output, agreement):  # whose findings.csv a check would replace
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
            trackers = Trackers(config.report_to, output)
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
    if Path(config.output_dir).is_file():
        raise UserError(f"--output_dir {config.output_dir} is a file; name a folder")
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
        none = "" if stopped.evaluated else NO_WEIGHTS_YET
        fail(f"{stopped}; everything is saved, continue with --resume{none}", stopped.exit_code)
    except KeyboardInterrupt as stopped:  # not in the loop, or the second signal in it
        code = getattr(stopped, "exit_code", INTERRUPTED)
        fail("stopped at once; --resume continues from the last checkpoint, if there is one", code)


if __name__ == "__main__":
    main()
