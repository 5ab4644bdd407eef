"""The main job: `accelerate launch trainer/train.py`. One straight line from settings to a trained
detector.

Order of initialisation: process group, seed, datasets, model (random, then ImageNet body, then
--load_from, then --resume), average of the weights, optimiser, loop. See `train` for what happens
at each step.
"""

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from trainer import resume as checkpoints
from trainer.agreement import PATIENCE, Agreement, sum_gradients
from trainer.config import TrainConfig, parse_or_exit, resolved, write_yaml
from trainer.console import Console, score_table
from trainer.data import (
    Augmentation,
    DetectionDataset,
    noised_batch,
    pad_to,
    steps_per_epoch,
    training_loader,
)
from trainer.datasets import read_datasets, read_validation
from trainer.evaluation import Evaluation, Interrupted, evaluate
from trainer.findings import format_findings, write_findings
from trainer.launch_check import require_processes
from trainer.optim import learning_rate, make_ema, make_optimizer, set_learning_rate
from trainer.pictures import Comparison, compare, save_picture, truth_beside_prediction
from trainer.report import CsvLog, Progress, Report, TensorBoard, fan_out
from trainer.resume import RunState
from trainer.samples import SampleTable
from trainer.stopping import Stopped, StopRequest
from vidt.checkpoint import WeightsInfo, load_model, local_weights, save_weights, start_from
from vidt.criterion import SetCriterion
from vidt.images import read_image
from vidt.model import ViDT, ViDTConfig
from vidt.predictor import Detections
from vidt.preprocessing import Preprocessing
from vidt.pretrained import load_imagenet

logger = get_logger(__name__)

TRAIN_WORK = 3  # cost of an image in training, in evaluations of an image; for the progress bar
NUM_PICTURES = 16


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nothing was saved since."""


@dataclass(frozen=True)
class Clock:
    """How long a run is, in optimiser steps and in work (for progress)."""

    per_epoch: int
    total_steps: int
    step_images: int
    val_images: int
    eval_interval: int

    def epoch(self, step: int) -> int:
        """The epoch that the last of `step` steps belongs to, from 0."""
        return max(step - 1, 0) // self.per_epoch

    def epoch_ends(self, step: int) -> bool:
        return step > 0 and (step % self.per_epoch == 0 or step == self.total_steps)

    def evaluation_due(self, step: int) -> bool:
        every = self.per_epoch * self.eval_interval
        return step > 0 and (step % every == 0 or step == self.total_steps)

    def fraction(self, step: int, evaluating: float = 0.0) -> float:
        """Share of the run's work that is done after `step` steps and part of the evaluation that
        follows them.
        """
        every = self.per_epoch * self.eval_interval
        evaluations = max(step - 1, 0) // every + evaluating
        work = step * self.step_images * TRAIN_WORK + evaluations * self.val_images
        all_evaluations = -(-self.total_steps // every)
        total = self.total_steps * self.step_images * TRAIN_WORK + all_evaluations * self.val_images
        return min(work / total, 1.0)


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
    `trainer.report`).

    train_set and val_set share their class names; model_fields are those of `ViDTConfig`. report is
    called on the main process only. Files in `config.output_dir`: best and last weights,
    `checkpoints/`, `config.yaml`.

    Raises ValueError for what a user can mend, NonFiniteLoss, and Stopped after SIGTERM or SIGINT
    once all is saved.
    """
    accelerator = accelerator or make_accelerator()
    agreement = Agreement(accelerator)
    tell = report if accelerator.is_main_process else (lambda progress: None)
    output = Path(config.output_dir)
    set_seed(config.seed)

    model_config = ViDTConfig(**{**model_fields, "num_classes": len(train_set.class_names)})
    preprocessing = Preprocessing(eval_size=config.eval_size)
    model = ViDT(model_config)
    load_start(model, config, train_set.class_names, agreement)
    ema = make_ema(model, config.ema_decay) if config.ema else None
    # Prepared "for evaluation", which leaves DistributedDataParallel out: see `sum_gradients`.
    model = accelerator.prepare_model(model, evaluation_mode=True).train()
    if ema is not None:
        ema.to(accelerator.device)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config))
    criterion = SetCriterion(aux_copies=config.aux_copies, quality_target=config.quality_target)

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
    if config.resume is not None:
        state = restore(state, config, model, ema, optimizer, accelerator, agreement)
    dataset = DetectionDataset(
        train_set,
        Augmentation.from_config(config),
        preprocessing,
        seed=config.seed,
        noised_queries=config.denoising,
    )

    def say(event: str, metrics: Mapping[str, float] | None = None, **more: Any) -> None:
        fraction = more.pop("fraction", None) or clock.fraction(state.step)
        tell(
            Progress(
                event=event,  # type: ignore[arg-type]
                fraction=fraction,
                epoch=clock.epoch(state.step),
                step=state.step,
                total_steps=clock.total_steps,
                total_epochs=config.epochs,
                metrics=metrics or {},
                **more,
            )
        )

    def save_state() -> None:
        if accelerator.is_main_process:
            if accelerator.scaler is not None:
                state.scaler = accelerator.scaler.state_dict()
            tensors = checkpoints.tensors_of(model, ema, optimizer)
            path = checkpoints.save(output / "checkpoints", state, tensors, keep=config.keep)
            say("saved", message=f"saved {path}")

    def evaluate_now(stop: StopRequest) -> None:
        say("evaluating")
        evaluation = evaluate(
            ema.module if ema is not None else model,
            val_set,
            preprocessing,
            accelerator,
            agreement,
            batch_size=config.eval_batch_size or config.batch_size,
            num_workers=config.num_workers,
            tick=lambda done: say("evaluating", fraction=clock.fraction(state.step, done)),
            stop=lambda: bool(stop.signum),
        )
        best = note_evaluation(state, evaluation.metrics)
        if not accelerator.is_main_process:
            return
        weights = ema.module.state_dict() if ema is not None else model.state_dict()
        info = WeightsInfo(model_config, train_set.class_names, preprocessing, evaluation.metrics)
        save_weights(output / "last.safetensors", weights, info)
        if best:
            save_weights(output / "best.safetensors", weights, info)
        rows = comparisons(val_set, evaluation.detections)
        if rows:
            names = train_set.class_names
            save_picture(truth_beside_prediction(rows, names), output / "predictions.jpg")
        say(
            "evaluation",
            evaluation.metrics,
            fraction=clock.fraction(state.step, 1.0),
            weights=output / "last.safetensors",
            best=best,
            pictures=[compare(row, train_set.class_names) for row in rows],
        )

    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_yaml(output / "config.yaml", config, model_fields)
    say("start", message=describe(accelerator, config, clock, state))
    losses = LossLog(agreement, output, step_images)
    batches: Iterator[dict[str, Any]] | None = None
    with StopRequest() as stop:
        while True:
            # Here the weights are those after `state.step` steps, whether trained or restored.
            if clock.evaluation_due(state.step) and state.evaluated_step != state.step:
                try:
                    evaluate_now(stop)
                except Interrupted:
                    save_state()
                    raise Stopped(stop.signum or 15) from None
                state.stopped_early = 0 < config.patience <= state.stale_evaluations
                finished = state.stopped_early or state.step == total_steps
                if finished or clock.epoch(state.step) % config.save_interval == 0:
                    save_state()
            if state.stopped_early or state.step >= total_steps:
                break
            if batches is None:
                batches = micro_batches(dataset, config, state, total_steps, accelerator)
            window = [next(batches) for _ in range(state.n_iter_to_acc)]
            num_boxes, canvas, signum = agree_on(window, stop, agreement)
            if signum:
                losses.check(state.step)
                save_state()
                raise Stopped(signum)

            rate = learning_rate(state.step, total_steps, config)
            set_learning_rate(optimizer, rate)
            # All that is random in a step follows from its number: nothing to save, nothing to
            # restore.
            set_seed(config.seed + state.step, device_specific=True)
            terms = gradients(model, criterion, accelerator, window, canvas, num_boxes)
            if agreement.any(terms is None):
                optimizer.zero_grad()
                window, batches = (
                    [],
                    None,
                )  # frees the memory; the same images come again, in smaller portions
                clear_device_cache()
                state.n_iter_to_acc = smaller_portions(config, state.n_iter_to_acc, canvas)
                continue
            assert terms is not None
            sum_gradients(list(model.parameters()), accelerator.num_processes)
            norm = accelerator.clip_grad_norm_(
                model.parameters(), config.clip_max_norm or float("inf")
            )
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.optimizer_step_was_skipped:
                state.skipped_updates += 1
            elif ema is not None:
                ema.update(model, step=state.step - state.skipped_updates)
            losses.add(
                state.step, terms, norm, [t["image_id"] for b in window for t in b["targets"]]
            )
            state.step += 1

            save_due = config.save_steps and state.step % config.save_steps == 0
            epoch_over = clock.epoch_ends(state.step)
            if state.step % config.log_interval == 0 or save_due or epoch_over:
                say("step", {**losses.check(state.step), "lr": rate})
                check_readable(dataset, config, agreement)
            evaluation_follows = clock.evaluation_due(state.step)
            if save_due and not evaluation_follows:
                save_state()
            elif epoch_over and not evaluation_follows:
                if (clock.epoch(state.step) + 1) % config.save_interval == 0:
                    save_state()
    metrics = {**state.best_metrics, "best_epoch": float(clock.epoch(state.best_step))}
    say("end", metrics, fraction=1.0, weights=output / "best.safetensors", message=closing(state))
    return state.best_metrics


def make_accelerator() -> Accelerator:
    """No tracker, no telemetry; processes and precision come from the launcher."""
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    # Without a device of its own, a process must be told so to join the others over gloo.
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, kwargs_handlers=[patient], rng_types=[])


def load_start(
    model: ViDT, config: TrainConfig, class_names: tuple[str, ...], agreement: Agreement
) -> None:
    """Fills the model: a resumed run restores everything later, --load_from whole detectors, else
    the body.
    """
    if config.resume is not None:
        return
    if config.load_from is not None:
        path = local_weights(config.load_from, agreement.from_main)
        transfer = start_from(model, path, class_names)
        logger.info(f"started from {config.load_from}; classes: {transfer}")
        return
    load_imagenet(model.backbone, model.config.backbone_name, config.pre_trained)


def restore(
    fresh: RunState,
    config: TrainConfig,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    agreement: Agreement,
) -> RunState:
    """The state and tensors of the newest whole checkpoint; `fresh` if `--resume auto` finds none.

    Raises ValueError if --resume names a folder without one, or one that this run cannot go on
    from.
    """
    wanted = (
        Path(config.output_dir) / "checkpoints"
        if config.resume == "auto"
        else Path(config.resume or "")
    )
    found = agreement.from_main(_find_checkpoint(wanted) if accelerator.is_main_process else None)
    path, passed_over = found
    for line in passed_over:
        logger.warning(f"passed over: {line}")
    if path is None:
        if config.resume == "auto":
            logger.info(f"nothing to resume in {wanted}: a fresh run")
            return fresh
        raise ValueError(f"--resume {config.resume}: no whole checkpoint there")
    state, tensors = checkpoints.load(path)
    for name, meaning in (
        ("step_images", "images per optimiser step"),
        ("dataset", "training set"),
    ):
        if getattr(state, name) != getattr(fresh, name):
            raise ValueError(
                f"--resume {path}: its {meaning} is {getattr(state, name)}, this run's {getattr(fresh, name)}; "
                "give the same data, batch_size and number of processes, or start anew with --load_from"
            )
    changed = [key for key, value in fresh.settings.items() if state.settings.get(key) != value]
    for key in changed:
        logger.warning(
            f"resuming with {key} {fresh.settings[key]}, it was {state.settings.get(key)}"
        )
    try:
        checkpoints.restore_tensors(tensors, model, ema, optimizer)
    except (RuntimeError, KeyError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"--resume {path}: it is of another architecture: {line}") from error
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    state.settings = fresh.settings
    return state


def _find_checkpoint(wanted: Path) -> tuple[Path | None, list[str]]:
    """The newest whole one in a folder of checkpoints, of a run, or the folder itself."""
    if (wanted / checkpoints.STATE).exists():
        return checkpoints.newest_whole([wanted])
    inner = wanted / "checkpoints"
    return checkpoints.newest_whole(checkpoints.checkpoints(inner if inner.is_dir() else wanted))


def micro_batches(
    dataset: DetectionDataset,
    config: TrainConfig,
    state: RunState,
    total_steps: int,
    accelerator: Accelerator,
) -> Iterator[dict[str, Any]]:
    """This process's micro-batches from the present step to the end of the run, on its device."""
    loader = training_loader(
        dataset,
        config,
        num_processes=accelerator.num_processes,
        micro_batch=config.batch_size // state.n_iter_to_acc,
        steps=range(state.step, total_steps),
    )
    return iter(accelerator.prepare_data_loader(loader))


def agree_on(
    window: list[dict[str, Any]], stop: StopRequest, agreement: Agreement
) -> tuple[float, tuple[int, int], int]:
    """What a step needs to know of all its micro-batches on all processes: the number of boxes (at
    least 1), the (height, width) to pad to, and the signal to stop by (0: none). One exchange
    between hosts.
    """
    boxes = sum(len(target["labels"]) for batch in window for target in batch["targets"])
    height = max(batch["images"].shape[2] for batch in window)
    width = max(batch["images"].shape[3] for batch in window)
    rows = agreement.gather(boxes, height, width, stop.signum)
    most = rows.amax(0)
    return max(rows[:, 0].sum().item(), 1.0), (int(most[1]), int(most[2])), int(most[3])


def gradients(
    model: nn.Module,
    criterion: SetCriterion,
    accelerator: Accelerator,
    window: list[dict[str, Any]],
    canvas: tuple[int, int],
    num_boxes: float,
) -> dict[str, Tensor] | None:
    """Adds the window's gradients to the parameters; returns its loss terms, or None if memory ran
    out.

    Terms are normalised by the boxes of the whole step, so micro-batches and processes simply add
    up.
    """
    sums: dict[str, Tensor] = {}
    try:
        for batch in window:
            images, padding = pad_to(batch, canvas)
            targets = batch["targets"]
            outputs = model(images, padding, noised_batch(targets))
            terms = criterion(outputs, targets, num_boxes)
            accelerator.backward(torch.stack(list(terms.values())).sum())
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return None
    return sums


def smaller_portions(config: TrainConfig, n_iter_to_acc: int, canvas: tuple[int, int]) -> int:
    """The next number of micro-batches that divides the batch, at least twice the present one.

    Raises ValueError when a micro-batch is one image already.
    """
    size = config.batch_size
    larger = [n for n in range(2 * n_iter_to_acc, size + 1) if size % n == 0] or [size]
    if n_iter_to_acc == size:
        raise ValueError(
            f"out of memory with one image of {canvas[0]} x {canvas[1]} pixels at a time; "
            "lower --eval_size or --train_max_size, or choose a smaller --backbone_name"
        )
    logger.warning(
        f"out of memory: --batch_size {size} is now computed in {larger[0]} portions on every process; "
        f"the result is the same. Pass --n_iter_to_acc {larger[0]} to start that way"
    )
    return larger[0]


class LossLog:
    """Loss terms of the steps since the last look. They stay on the device until then: no wait at
    every step.
    """

    def __init__(self, agreement: Agreement, output: Path, step_images: int) -> None:
        self.agreement, self.output, self.step_images = agreement, output, step_images
        self.since = time.monotonic()
        self.pending: list[tuple[int, dict[str, Tensor], list[int]]] = []
        self.norm = torch.zeros(())

    def add(self, step: int, terms: dict[str, Tensor], norm: Tensor, image_ids: list[int]) -> None:
        self.pending.append((step, terms, image_ids))
        self.norm = norm

    def check(self, step: int) -> dict[str, float]:
        """Means over the steps since the last call, summed over processes, with speed and memory.

        Raises NonFiniteLoss on every process if any of them met one, after writing
        `non_finite.json`.
        """
        if not self.pending:
            return {}
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack(list(terms.values())) for _, terms, _ in self.pending])
        values = values.double().cpu()  # [steps, terms]; the one wait
        self._refuse_non_finite(names, values)
        means = self.agreement.gather(*values.mean(0).tolist()).sum(0).tolist()
        now = time.monotonic()
        metrics = {"loss": sum(means), **dict(zip(names, means, strict=True))}
        metrics["grad_norm"] = float(self.norm)
        metrics["images_per_second"] = (
            len(self.pending) * self.step_images / max(now - self.since, 1e-9)
        )
        metrics["memory_gib"] = memory_gib()
        self.pending, self.since = [], now
        return metrics

    def _refuse_non_finite(self, names: list[str], values: Tensor) -> None:
        bad_rows = (~values.isfinite()).any(1).nonzero().flatten().tolist()
        finding = None
        if bad_rows:
            step, _, image_ids = self.pending[bad_rows[0]]
            terms = dict(zip(names, values[bad_rows[0]].tolist(), strict=True))
            finding = {
                "step": step,
                "terms": {k: str(v) for k, v in terms.items()},
                "image_ids": image_ids,
            }
        findings = [found for found in self.agreement.gather_objects(finding) if found is not None]
        if not findings:
            return
        first = min(findings, key=lambda found: found["step"])
        path = self.output / "non_finite.json"
        path.write_text(json.dumps(findings, indent=1))
        bad_terms = ", ".join(f"{k}={v}" for k, v in first["terms"].items() if not _finite(v))
        raise NonFiniteLoss(
            f"the loss is not finite at step {first['step']}: {bad_terms}; images {first['image_ids']} "
            f"(see {path}); weights on disk are from before. Try a lower --lr or --clip_max_norm"
        )


def _finite(text: str) -> bool:
    return text not in ("nan", "inf", "-inf")


def memory_gib() -> float:
    """Most memory used so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def check_readable(dataset: DetectionDataset, config: TrainConfig, agreement: Agreement) -> None:
    """Says how many images went bad since the check before training; raises ValueError when they
    are too many.
    """
    unreadable = int(agreement.gather(int(dataset.unreadable.sum())).max())
    if unreadable > dataset.reported:
        first = int(dataset.unreadable.nonzero()[0]) if dataset.unreadable.any() else 0
        logger.warning(
            f"{unreadable} images can no longer be read, such as {dataset.samples[first].path}; others took their place"
        )
        dataset.reported = unreadable
    if unreadable > config.max_bad_fraction * len(dataset):
        raise ValueError(
            f"{unreadable} of {len(dataset)} training images cannot be read, more than --max_bad_fraction "
            f"{config.max_bad_fraction} allows"
        )


def note_evaluation(state: RunState, metrics: dict[str, float]) -> bool:
    """The one place where "best" is decided: writes the evaluation into the state; True if it is
    the best so far.
    """
    state.evaluated_step = state.step
    best = state.best_step < 0 or metrics["map50"] > state.best_map50
    if best:
        state.best_map50, state.best_step = metrics["map50"], state.step
        state.best_metrics, state.stale_evaluations = dict(metrics), 0
    else:
        state.stale_evaluations += 1
    return best


def comparisons(samples: SampleTable, detections: dict[int, Detections]) -> list[Comparison]:
    """Truth beside prediction for a few images of this process's share, spread over the table."""
    indices = sorted(detections)
    chosen = indices[:: max(len(indices) // NUM_PICTURES, 1)][:NUM_PICTURES]
    rows = []
    for index in chosen:
        sample, found = samples[index], detections[index]
        rows.append(
            Comparison(
                image=read_image(sample.path, sample.size),
                truth_boxes=sample.boxes,
                truth_labels=sample.labels,
                boxes=found.boxes,
                labels=found.labels,
                scores=found.scores,
                name=Path(sample.path).name,
            )
        )
    return rows


def describe(accelerator: Accelerator, config: TrainConfig, clock: Clock, state: RunState) -> str:
    """One line on what is about to run, and where."""
    start = f"resumed at step {state.step}" if state.step else "from step 0"
    precision = accelerator.mixed_precision
    if precision == "fp16" and accelerator.device.type == "cpu":
        precision = "fp16 asked for, but a CPU computes fp32 (bf16 works)"
    return (
        f"{start} to {clock.total_steps} ({clock.per_epoch} per epoch), {clock.step_images} images a step on "
        f"{accelerator.num_processes} x {accelerator.device.type}, precision {precision}; results in {config.output_dir}"
    )


def closing(state: RunState) -> str:
    if state.stopped_early:
        return f"stopped early: no better map50 in {state.stale_evaluations} evaluations"
    return f"done after {state.step} steps"


def main() -> None:
    """The command line. Exit codes: 0 done, 2 a user's error, 3 non-finite loss, 130 and 143
    stopped by a signal.
    """
    config, model_fields = parse_or_exit()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    accelerator = make_accelerator()
    try:
        require_processes(accelerator.num_processes)
        run = evaluate_only if config.eval else train_from_settings
        run(config, model_fields, accelerator)
    except ValueError as error:
        fail(str(error), 2)
    except NonFiniteLoss as error:
        fail(str(error), 3)
    except Stopped as stopped:
        fail(f"{stopped}; go on with --resume", stopped.exit_code)
    accelerator.end_training()


def fail(line: str, code: int) -> None:
    sys.stderr.write(f"error: {line}\n" if code < 128 else f"{line}\n")
    sys.exit(code)


def train_from_settings(
    config: TrainConfig, model_fields: dict[str, Any], accelerator: Accelerator
) -> None:
    """Reads and checks the data on the main process, shares it, trains, and shows the run."""
    agreement = Agreement(accelerator)
    output = Path(config.output_dir)
    train_set, val_set = on_main(
        accelerator, agreement, lambda: checked_datasets(config, model_fields)
    )
    if config.check:
        return
    console = Console(
        files={
            "best weights": output / "best.safetensors",
            "last weights": output / "last.safetensors",
            "predictions": output / "predictions.jpg",
            "metrics": output / "metrics.csv",
            "settings": output / "config.yaml",
        }
    )
    with contextlib.closing(console):
        report: Report = lambda progress: None  # noqa: E731, only the main process opens files
        if accelerator.is_main_process:
            events = TensorBoard(Path(config.tensorboard_dir or output / "tensorboard"))
            report = fan_out(console, CsvLog(output / "metrics.csv"), events)
        train(config, model_fields, train_set, val_set, report, accelerator=accelerator)


def on_main(accelerator: Accelerator, agreement: Agreement, work: Callable[[], Any]) -> Any:
    """Does `work` on the main process and gives its result to all; a ValueError is raised on
    all.
    """
    result: Any = None
    if accelerator.is_main_process:
        try:
            result = work()
        except ValueError as error:
            result = error
    result = agreement.from_main(result)
    if isinstance(result, ValueError):
        raise result
    return result


def checked_datasets(
    config: TrainConfig, model_fields: Mapping[str, Any]
) -> tuple[SampleTable, SampleTable]:
    """Both splits; every finding goes to the log and to `findings.csv`."""
    train_set, val_set, findings = read_datasets(
        config,
        num_queries=model_fields["det_token_num"],
        num_classes=model_fields["num_classes"],
    )
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_findings(output / "findings.csv", findings)
    for table in (train_set, val_set):
        logger.info(f"{table.source}: {len(table)} images, {len(table.labels)} boxes")
    logger.info(f"classes: {', '.join(train_set.class_names)}")
    logger.info(format_findings(findings))
    return train_set, val_set


def evaluate_only(
    config: TrainConfig, model_fields: dict[str, Any], accelerator: Accelerator
) -> None:
    """`--eval --load_from FILE`: the COCO numbers of a weights file on the validation set, at
    --eval_size.
    """
    if config.load_from is None:
        raise ValueError("--eval needs --load_from FILE, the weights to evaluate")
    agreement = Agreement(accelerator)
    model, info = load_model(local_weights(config.load_from, agreement.from_main))
    if info.preprocessing.eval_size != config.eval_size:
        logger.warning(
            f"{config.load_from} was trained for --eval_size {info.preprocessing.eval_size}; "
            f"this evaluates it at {config.eval_size}"
        )
    val_set, findings = on_main(
        accelerator, agreement, lambda: read_validation(config, info.class_names)
    )
    logger.info(format_findings(findings))
    evaluation: Evaluation = evaluate(
        accelerator.prepare_model(model, evaluation_mode=True),
        val_set,
        Preprocessing(config.eval_size, info.preprocessing.mean, info.preprocessing.std),
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


if __name__ == "__main__":
    main()
