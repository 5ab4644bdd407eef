"""What a run starts from: the weights of an ImageNet backbone or a detector, or a checkpoint; and
the teacher that it learns from. The main process fetches and reads a file of weights; the others
receive its tensors.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from torch.optim import Optimizer

from trainer.loop import resume
from trainer.loop.agreement import Agreement
from trainer.loop.resume import Checkpoint, RunState, saved_settings
from trainer.settings.config import TrainConfig
from trainer.settings.plan import repeated
from vidt.errors import UserError
from vidt.losses.distillation import SHARED, TokenMatching, require_pair
from vidt.model.config import ViDTConfig
from vidt.model.vidt import ViDT, build_detector
from vidt.model.without_neck import ViDTWithoutNeck
from vidt.weights.checkpoint import (
    NOT_SHARED,
    load_model,
    read_start,
    start_from,
)
from vidt.weights.pretrained import load_imagenet
from vidt.weights.published import (
    TEACHERS,
    is_remote,
    local_weights,
    nearest_model,
    published_for,
)
from vidt.weights.weights_file import UnusableWeights, WeightsInfo, fill_strictly

logger = get_logger(__name__)

NO_FILE = ("imagenet", "coco", "none")  # values of --pre_trained that are not a path


def require_files(config: TrainConfig) -> None:
    """Raises UnusableWeights if a weights file that the run needs does not exist. Call it first:
    weights are read only after the data, which can take long.
    """
    files = {"--distil_model_path": config.distil_model_path, "--load_from": config.load_from}
    if config.resume is None and config.load_from is None and config.pre_trained not in NO_FILE:
        files["--pre_trained"] = config.pre_trained
    for flag, source in files.items():
        if source is None or Path(source).is_file():
            continue
        if flag != "--pre_trained" and is_remote(source):
            continue
        what = "a folder" if Path(source).is_dir() else "no such file"
        words = f"{', '.join(NO_FILE)} or " if flag == "--pre_trained" else ""
        hint = nearest_model(source) if flag != "--pre_trained" else ""
        raise UnusableWeights(
            f"{flag} {source}: {what}; give {words}the path of a weights file{hint}"
        )


def settled(
    config: TrainConfig, model: Mapping[str, Any], fixed: Collection[str]
) -> tuple[TrainConfig, dict[str, Any], frozenset[str]]:
    """What `--preset auto` takes from elsewhere than the data, and the names that are then fixed:
    the settings of the run to resume, else the architecture of the weights to start from, and what
    a teacher needs. Raises UserError for weights that cannot be read.
    """
    if config.resume is not None:
        folder = config.output_dir if config.resume == "auto" else config.resume
        saved = saved_settings(Path(folder))
        if saved is not None:
            config, fields = repeated(config, model, fixed, saved)
            return config, fields, frozenset({*vars(config), *fields})
    if config.distil_model or config.distil_model_path:
        fixed = {*fixed, *SHARED}
    source = config.load_from
    if source is None and config.pre_trained == "coco":
        source = published_for(
            model["backbone_name"], method=model["method"], epff=model["epff"]
        ).url
    elif source is None and config.pre_trained not in NO_FILE:  # a file of the given backbone
        fixed = {*fixed, "backbone_name"}
    if source is None:
        return config, dict(model), frozenset(fixed)
    _, architecture, _ = read_start(local_weights(source, allow_http=config.allow_http))
    shared = {name: value for name, value in vars(architecture).items() if name not in NOT_SHARED}
    taken = {name: value for name, value in shared.items() if name not in fixed}
    return config, {**model, **taken}, frozenset({*fixed, *shared})


def load_start(
    model: ViDT | ViDTWithoutNeck,
    config: TrainConfig,
    class_names: tuple[str, ...],
    agreement: Agreement,
) -> None:
    """Fills a fresh model: all of it from --load_from or with --pre_trained coco, else the backbone
    from --pre_trained. Raises UserError on every process.
    """

    def load() -> None:
        own, source = model.config, config.load_from
        if source is None and config.pre_trained == "coco":
            source = published_for(own.backbone_name, method=own.method, epff=own.epff).url
        if source is None:
            load_imagenet(model.backbone, own.backbone_name, config.pre_trained)
            return
        weights = local_weights(source, allow_http=config.allow_http)
        transfer = start_from(model, weights, class_names)
        logger.info(f"started from {source}; classes {transfer}")

    agreement.on_main(load)
    agreement.copy_from_main(model.state_dict().values())


def load_teacher(
    config: TrainConfig, student: ViDTConfig, accelerator: Accelerator, agreement: Agreement
) -> TokenMatching | None:
    """The frozen detector that --distil_model or --distil_model_path names, on this process's
    device and in the run's precision; None if neither is given.

    Raises UserError on every process, also for a teacher that does not fit the student.
    """
    published = TEACHERS[config.distil_model] if config.distil_model else None
    source = config.distil_model_path or (published.url if published else None)
    if source is None:
        return None
    loaded: list[nn.Module] = []

    def load() -> ViDTConfig:
        file = local_weights(source, "--distil_model_path", allow_http=config.allow_http)
        tensors, theirs, _ = read_start(file)
        if published and theirs.backbone_name != published.backbone_name:
            raise UnusableWeights(
                f"{source} has backbone_name {theirs.backbone_name}; --distil_model "
                f"{config.distil_model} has {published.backbone_name}"
            )
        require_pair(student, theirs, source)
        teacher = build_detector(theirs)
        fill_strictly(teacher, tensors, source)
        loaded.append(teacher)
        logger.info(f"distils from {source}: {theirs.backbone_name}")
        return theirs

    theirs = agreement.on_main(load)
    teacher = loaded[0] if loaded else build_detector(theirs)
    agreement.copy_from_main(teacher.state_dict().values())
    prepared = accelerator.prepare_model(teacher, evaluation_mode=True)
    return TokenMatching(prepared, distil_loss_coef=config.distil_loss_coef)


def load_detector(
    source: str,
    agreement: Agreement,
    dec_layers: int | None = None,
    *,
    allow_http: bool = False,
) -> tuple[nn.Module, WeightsInfo]:
    """A detector as it was saved, from a file or a URL, with its first dec_layers decoder layers or
    all of them. Raises UserError on every process.
    """
    loaded: list[nn.Module] = []

    def load() -> WeightsInfo:
        model, info = load_model(
            local_weights(source, allow_http=allow_http), dec_layers=dec_layers
        )
        loaded.append(model)
        return info

    info = agreement.on_main(load)
    model = loaded[0] if loaded else build_detector(info.config)
    agreement.copy_from_main(model.state_dict().values())
    return model, info


def find_checkpoint(config: TrainConfig, agreement: Agreement) -> Checkpoint | None:
    """The checkpoint to resume from, the same on every process; None for a fresh run.

    Raises UserError if --resume names a folder without an intact checkpoint.
    """
    if config.resume is None:
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
    own = output / resume.CHECKPOINTS
    inside = path.parent.resolve() != own and output in path.resolve().parents
    if inside and resume.checkpoints(own):
        raise UserError(
            f"--resume {wanted} lies inside --output_dir {config.output_dir}, which holds a "
            "run of its own; name another --output_dir"
        )
    return on_main[0] if on_main else resume.load(path)


def make_way(
    config: TrainConfig, checkpoint: Checkpoint | None, state: RunState, agreement: Agreement
) -> None:
    """Moves a run that the output folder holds, and that this one does not continue, into its
    folder `earlier`. The best weights of a run that is resumed from another folder come along; if
    they are not there, the next evaluation is the best so far.

    Call it when nothing can fail any more: a start that fails leaves the earlier run in place.
    """
    output = Path(config.output_dir)
    if checkpoint is not None:
        of_folder = (output / resume.CHECKPOINTS).resolve()
        if checkpoint.path.parent.resolve() == of_folder:
            return
    aside = agreement.on_main(lambda: resume.set_aside(output))
    if aside is not None:
        logger.warning(
            f"{config.output_dir} already holds a run, which this one does not continue. The "
            f"earlier run was moved to {aside} and replaced any run stored there; to continue it "
            f"pass --resume --output_dir {aside}"
        )
    if checkpoint is None or state.best_step < 0:
        return
    if not agreement.on_main(lambda: resume.bring_best(checkpoint, output)):
        state.forget_best()
        logger.warning(
            f"the best weights of {checkpoint.path.parent.parent} are missing, unreadable or newer "
            "than its checkpoint; the next evaluation counts as the best so far"
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
