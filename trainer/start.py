"""What a run starts from: random weights, an ImageNet body, another run's weights, or a checkpoint
of its own.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from trainer import resume as checkpoints
from trainer.agreement import Agreement
from trainer.config import TrainConfig
from trainer.resume import RunState
from vidt.checkpoint import WeightsInfo, load_model, local_weights, start_from
from vidt.model import ViDT
from vidt.pretrained import load_imagenet

logger = get_logger(__name__)


def load_start(
    model: ViDT, config: TrainConfig, class_names: tuple[str, ...], agreement: Agreement
) -> None:
    """Fills a fresh model: a whole detector where --load_from is given, else the body.

    The main process fetches and reads, the others get the tensors from it. Raises ValueError on
    all of them.
    """

    def load() -> None:
        if config.load_from is None:
            load_imagenet(model.backbone, model.config.backbone_name, config.pre_trained)
            return
        transfer = start_from(model, local_weights(config.load_from), class_names)
        logger.info(f"started from {config.load_from}; classes {transfer}")

    agreement.on_main(load)
    agreement.copy_from_main(model.state_dict().values())


def load_detector(source: str, agreement: Agreement) -> tuple[ViDT, WeightsInfo]:
    """A detector as it was saved, from a file or a URL; read by the main process, the same on all.

    Raises ValueError on all of them.
    """
    loaded: list[ViDT] = []

    def load() -> WeightsInfo:
        model, info = load_model(local_weights(source))
        loaded.append(model)
        return info

    info = agreement.on_main(load)
    model = loaded[0] if loaded else ViDT(info.config)
    agreement.copy_from_main(model.state_dict().values())
    return model, info


def find_checkpoint(config: TrainConfig, agreement: Agreement) -> Path | None:
    """What to resume from, the same on every process; None for a fresh run.

    Raises ValueError if --resume names a place without a whole checkpoint.
    """
    if config.resume is None:
        if checkpoints.checkpoints(Path(config.output_dir) / "checkpoints"):
            logger.warning(
                f"{config.output_dir} holds a run already: this one starts anew and replaces it "
                "from its first checkpoint on; to go on with that one, stop and pass --resume"
            )
        return None
    wanted = Path(config.output_dir if config.resume == "auto" else config.resume)
    found = agreement.on_main(lambda: checkpoints.find(wanted))
    path, passed_over = found
    for line in passed_over:
        logger.warning(f"passed over: {line}")
    if path is None and config.resume != "auto":
        raise ValueError(f"--resume {config.resume}: there is no whole checkpoint")
    if path is None:
        logger.info(f"nothing to resume in {wanted}: a fresh run")
    return path


def restore(
    path: Path,
    fresh: RunState,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Any,
    accelerator: Accelerator,
) -> RunState:
    """State and tensors of a checkpoint. Raises ValueError for one that this run cannot go on
    from.
    """
    state, tensors = checkpoints.load(path)
    for line in checkpoints.changed_settings(state, fresh):
        logger.warning(line)
    checkpoints.restore_tensors(tensors, model, ema, optimizer)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    asked = ("batch_size", "n_iter_to_acc")
    if any(state.settings.get(name) != fresh.settings[name] for name in asked):
        state.n_iter_to_acc = fresh.n_iter_to_acc  # else what memory allowed still holds
    state.stopped_early = 0 < fresh.settings["patience"] <= state.stale_evaluations
    state.settings = fresh.settings
    return state
