"""The platform's task: `env.yaml` and `config.yaml` as typed values, and the trainer's settings.

torch is imported only where settings and weights are read: the process that starts the ranks must
report a mistake at once.
"""

import logging
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vidt.arguments import MIXED_PRECISIONS
from vidt.errors import counted
from ymir_adapter.protocol.environment import (
    InputPaths,
    OutputPaths,
    read_environment,
    read_mapping,
)
from ymir_adapter.protocol.errors import Code, TaskError, one_line
from ymir_adapter.protocol.values import (
    is_given,
    to_bool,
    to_float,
    to_int,
    to_list,
    to_precision,
    to_text,
)

if TYPE_CHECKING:
    from trainer.settings.config import TrainConfig

logger = logging.getLogger(__name__)

STAGES_SINCE = (1, 0, 0)
DETECTION = 2  # the platform's object_type
AS_TRAINED, EQUAL = "auto", "equal"  # of img_size and class_distribution: forms drop empty values
SMALLEST_SIZE, LARGEST_SIZE = 32, 4096  # of img_size
ALGORITHMS = ("random", "entropy", "cald", "aldd")
MOST_GPUS = 1024  # of a task
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Key of the training template to the trainer's flag and the reader of its value.
TEMPLATE = {
    "preset": ("preset", to_text),
    "method": ("method", to_text),
    "backbone_name": ("backbone_name", to_text),
    "pre_trained": ("pre_trained", to_text),
    "epochs": ("epochs", to_int),
    "learning_rate": ("lr", to_float),
    "batch_size_per_gpu": ("batch_size", to_int),
    "num_workers_per_gpu": ("num_workers", to_int),
    "eval_size": ("eval_size", to_int),
    "weight_save_interval": ("save_interval", to_int),
    "mixed_precision": ("mixed_precision", to_precision),
}
# Flags of the trainer that name its data.
DATA_FLAGS = (
    *("data", "dataset_file", "coco_path", "voc_path", "yolo_path"),
    *("train_json", "train_images", "val_json", "val_images"),
)


@dataclass(frozen=True)
class Task:
    """One task. `gpu_ids` is empty on the CPU; `protocol` (0, 0, 0) where env.yaml names none."""

    task_id: str
    protocol: tuple[int, int, int]
    run_training: bool
    run_mining: bool
    run_infer: bool
    input: InputPaths
    output: OutputPaths
    config: Mapping[str, Any]
    class_names: tuple[str, ...]
    gpu_ids: tuple[int, ...]

    @property
    def has_stages(self) -> bool:
        """True if the platform reads model stages, and the list of a result as `boxes`."""
        return self.protocol >= STAGES_SINCE

    @property
    def weights(self) -> tuple[Path, ...]:
        """The weights files that the task names, of any kind. Packages of old platforms have them
        directly in `models_dir`: a file missing at its path is looked for there.
        """
        keys = ["model_params_path"]
        if self.run_training:
            keys = ["pretrained_model_params", "pretrained_model_paths"]
        for key in keys:
            if is_given(self.config, key):
                values = _entries(key, self.config[key])
                paths = [to_text(key, value) for value in values if str(value or "").strip()]
                return tuple(self._existing(self.input.root_dir / path) for path in paths)
        return ()

    def _existing(self, path: Path) -> Path:
        flat = self.input.models_dir / path.name
        return flat if not path.is_file() and flat.is_file() else path


@dataclass(frozen=True)
class CandidateSettings:
    """Settings of mining and inference. The web forms leave out zero and false, so that a default
    may be one of them only where a missing key means the same.

    `conf_threshold`: scores learnt with the focal loss are low. 0.1 keeps what a person wants to
    see and drops most of the 100 detections that every image has. AP needs 0.005.
    """

    conf_threshold: float = 0.1
    batch_size_per_gpu: int = 8
    num_workers_per_gpu: int = 2
    mining_algorithm: str = "entropy"  # one forward pass for each image, which inference can share
    class_balance: bool = False
    seed: int = 42
    mixed_precision: str = "auto"
    img_size: int | None = None  # short side of images, pixels; None: that of the weights
    class_distribution: tuple[float, ...] | None = None  # weights by class of the task; None: equal


def read_task(path: str | Path | None = None) -> Task:
    """Reads the task from `env.yaml`: `path`, else the file that DEFAULT_ENV_FILE_PATH names.

    Raises TaskError naming the file and key.
    """
    environment = read_environment(path)
    config = _read_config(environment["input"].config_file)
    if is_given(config, "object_type"):
        kind = to_int("object_type", config["object_type"])
        if kind != DETECTION:
            message = f"object_type is {kind}; this image is for detection, {DETECTION}, only"
            raise TaskError(Code.OBJECT_TYPE, message)
    return Task(
        **environment,
        config=config,
        class_names=_class_names(config),
        gpu_ids=_gpu_ids(config),
    )


def training_settings(task: Task) -> tuple["TrainConfig", dict[str, Any]]:
    """The trainer's settings and the fields of its ViDTConfig.

    `args_options` holds flags of the trainer, which override the template. Raises TaskError.
    """
    from trainer.loop.resume import CHECKPOINTS, checkpoints
    from trainer.settings.flags import ConfigError
    from trainer.settings.parsing import given_settings, parse

    words = _option_words(task.config)
    try:
        own = given_settings(words)
    except ConfigError as error:
        raise TaskError(Code.CONFIG, f"args_options: {one_line(error)}") from error
    try:
        base = {flag: value for flag, value in _base_settings(task).items() if flag not in own}
        weights = None
        if "load_from" not in own and own.get("resume") in (None, "auto"):
            weights = pick_weights(task)
        if weights is not None and "resume" not in own:
            base["load_from"] = str(weights)
        for mode in ("check", "eval"):
            if own.get(mode):
                raise TaskError(Code.CONFIG, f"args_options: --{mode} trains nothing; leave it out")
        for flag in DATA_FLAGS:
            if own.get(flag) is not None:
                message = f"args_options: --{flag}; the platform provides the data, leave it out"
                raise TaskError(Code.CONFIG, message)
        if own.get("report_to", ("tensorboard",)) != ("tensorboard",):
            message = "args_options: --report_to; the platform shows TensorBoard, leave it out"
            raise TaskError(Code.CONFIG, message)
        if own.get("with_vector"):
            message = "args_options: --with_vector needs masks, which this executor does not read"
            raise TaskError(Code.CONFIG, message)
        config, fields = parse(
            [*(f"--{flag}={value}" for flag, value in base.items()), *words], own_data=True
        )
    except ConfigError as error:
        raise TaskError(Code.CONFIG, in_form_words(one_line(error))) from error
    output = Path(config.output_dir)
    if "output_dir" in own and output.is_file():
        message = f"args_options: --output_dir {output} is a file; name a folder"
        raise TaskError(Code.CONFIG, message)
    if weights is not None and config.resume and not checkpoints(output / CHECKPOINTS):
        config = replace(config, resume=None, load_from=str(weights))  # nothing to resume
    if fields["num_classes"] not in (None, len(task.class_names)):
        raise TaskError(
            Code.CONFIG,
            f"args_options: --num_classes {fields['num_classes']}, but class_names has "
            f"{len(task.class_names)} entries; leave the flag out",
        )
    return config, {**fields, "num_classes": len(task.class_names)}


def fixed_fields(task: Task) -> frozenset[str]:
    """The settings that preset auto leaves alone, by the trainer's names: the form's fields that
    differ from the template, those of args_options, and those of the platform.
    """
    from trainer.settings.parsing import given_settings

    template = Path(__file__).parents[1] / "templates" / "training-template.yaml"
    defaults = yaml.safe_load(template.read_text(encoding="utf-8"))
    as_given = {
        flag
        for key, (flag, read) in TEMPLATE.items()
        if is_given(task.config, key)
        and (key not in defaults or read(key, task.config[key]) != read(key, defaults[key]))
    }
    own = given_settings(_option_words(task.config))
    platform = ("max_bad_fraction", "output_dir", "tensorboard_dir", "best_by")
    return frozenset({*as_given, *own, *platform})


def wants_onnx(task: Task) -> bool:
    """Whether each stage has an ONNX model too. Raises TaskError if this image cannot export."""
    if not is_given(task.config, "export_onnx") or not to_bool(
        "export_onnx", task.config["export_onnx"]
    ):
        return False
    missing = [name for name in EXPORT_PACKAGES if find_spec(name) is None]
    if missing:
        message = (
            f"export_onnx needs {', '.join(missing)}, which this image does not have; choose no"
        )
        raise TaskError(Code.CONFIG, message)
    return True


def candidate_settings(task: Task) -> CandidateSettings:
    """Settings of mining and inference, from either template. Raises TaskError."""
    readers: dict[str, Callable[[str, object], Any]] = {
        "conf_threshold": to_float,
        "img_size": lambda key, value: None if _is(value, AS_TRAINED) else to_int(key, value),
        "batch_size_per_gpu": to_int,
        "num_workers_per_gpu": to_int,
        "mixed_precision": to_precision,
        "mining_algorithm": lambda key, value: to_text(key, value).lower(),
        "class_balance": to_bool,
        "class_distribution": _class_distribution,
        "seed": to_int,
    }
    given = {key: read for key, read in readers.items() if is_given(task.config, key)}
    settings = CandidateSettings(
        **{key: read(key, task.config[key]) for key, read in given.items()}
    )
    algorithms = f"one of {', '.join(ALGORITHMS)}"
    precisions = f"one of {', '.join(MIXED_PRECISIONS)}"
    for key, is_valid, expected in (
        (
            "img_size",
            settings.img_size is None or SMALLEST_SIZE <= settings.img_size <= LARGEST_SIZE,
            f"{AS_TRAINED} or from {SMALLEST_SIZE} to {LARGEST_SIZE} pixels",
        ),
        ("conf_threshold", 0 <= settings.conf_threshold <= 1, "from 0 to 1"),
        ("batch_size_per_gpu", 1 <= settings.batch_size_per_gpu <= 65_536, "from 1 to 65536"),
        ("num_workers_per_gpu", 0 <= settings.num_workers_per_gpu <= 256, "from 0 to 256"),
        ("seed", 0 <= settings.seed < 2**32, "from 0 to 4294967295"),
        ("mining_algorithm", settings.mining_algorithm in ALGORITHMS, algorithms),
        ("mixed_precision", settings.mixed_precision in MIXED_PRECISIONS, precisions),
    ):
        if not is_valid:
            value = getattr(settings, key)
            raise TaskError(Code.CONFIG, f"{key} is {value}; it must be {expected}")
    weights = settings.class_distribution
    if weights is not None and len(weights) != len(task.class_names):
        raise TaskError(
            Code.CONFIG,
            f"class_distribution has {counted(len(weights), 'weight')}; it must have one for each "
            f"of the {len(task.class_names)} classes {', '.join(task.class_names[:5])} ...",
        )
    return settings


def _class_distribution(key: str, value: object) -> tuple[float, ...] | None:
    if _is(value, EQUAL):
        return None
    weights = tuple(to_float(key, part) for part in to_list(key, value))
    if any(weight < 0 for weight in weights) or not any(weights):
        message = f"{key} is {value!r}; weights must be 0 or more, and one above 0"
        raise TaskError(Code.CONFIG, message)
    return weights


def _is(value: object, word: str) -> bool:
    return isinstance(value, str) and value.strip().lower() == word


def pick_weights(task: Task) -> Path | None:
    """The file of `task.weights` that this detector can load, by its content: one of ours (of
    several the one with the best map50), else, for training, a file of the released code.

    None if a training names no weights. Raises TaskError if another task names none, if all are
    missing, or if none can be used.
    """
    from vidt.weights.checkpoint import read_start
    from vidt.weights.weights_file import UnusableWeights, read_info

    listed = task.weights
    if not listed:
        if task.run_training:
            return None
        raise TaskError(Code.MODEL, "model_params_path names no weights; choose a trained model")
    present = [path for path in listed if path.is_file()]
    if not present:
        raise TaskError(Code.MODEL, f"{listed[0]} does not exist; choose another model")
    scores: dict[Path, float] = {}
    reasons = [f"{path} does not exist" for path in listed if path not in present]
    for path in present:
        try:
            score = read_info(path).metrics.get("map50", -1.0)
            scores[path] = score if math.isfinite(score) else -1.0
        except UnusableWeights as error:
            reasons.append(one_line(error))
    if scores:
        best = max(scores, key=lambda path: scores[path])
        if len(scores) > 1:
            logger.info(f"{len(scores)} weights files; {best} has the best map50, {scores[best]}")
        return best
    for path in present if task.run_training else ():
        try:
            read_start(path)
            return path
        except UnusableWeights as error:
            reasons.append(one_line(error))
    reasons.sort(key=lambda reason: ".onnx " not in reason)  # such a file lies beside the weights
    raise TaskError(Code.MODEL, f"no weights of this detector were given: {reasons[-1]}")


def _read_config(path: Path) -> dict[str, Any]:
    """`config.yaml` over the defaults of the file that its `code_config` names, if any."""
    config = read_mapping(path)
    if not is_given(config, "code_config"):
        return config
    defaults = read_mapping(Path(to_text("code_config", config["code_config"])))
    return defaults | config


def _entries(key: str, value: object) -> list[Any]:
    """A list, text such as `[a, b]`, or one entry, which may have commas in it."""
    is_one = isinstance(value, str) and not value.strip().startswith("[")
    return [value] if is_one else to_list(key, value)


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    if not is_given(config, "class_names"):
        raise TaskError(Code.CONFIG, "class_names is missing; it must name one class or more")
    value = config["class_names"]
    entries = _entries("class_names", value)
    names = [str(entry) for entry in entries]  # YAML reads `1` as a number and `yes` as True
    if not names or not all(isinstance(entry, str | int | float) for entry in entries):
        raise TaskError(Code.CONFIG, f"class_names is {value!r}; it must be a list of names")
    counts = Counter(names)
    for name in names:
        if counts[name] > 1 or not name.strip():
            message = f"class_names has {name!r}; each name must occur once and not be blank"
            raise TaskError(Code.CONFIG, message)
    return tuple(names)


def _gpu_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """GPU numbers, counted from 0 inside the container. The command line may give a count only."""
    if config.get("gpu_id") is None:
        count = to_int("gpu_count", config["gpu_count"]) if is_given(config, "gpu_count") else 0
        if not 0 <= count <= MOST_GPUS:
            message = f"gpu_count is {count}; it must be from 0 to {MOST_GPUS}"
            raise TaskError(Code.CONFIG, message)
        return tuple(range(count))
    ids = tuple(to_int("gpu_id", part) for part in to_list("gpu_id", config["gpu_id"]))
    if len(set(ids)) < len(ids) or any(number < 0 for number in ids):
        value = config["gpu_id"]
        message = f"gpu_id is {value!r}; it must be different numbers, 0 or more, such as 0,1"
        raise TaskError(Code.CONFIG, message)
    return ids


def _option_words(config: Mapping[str, Any]) -> list[str]:
    if not is_given(config, "args_options"):
        return []
    text = to_text("args_options", config["args_options"])
    try:
        return shlex.split(text)
    except ValueError as error:
        raise TaskError(Code.CONFIG, f"args_options is {text!r}: {error}") from error


def _base_settings(task: Task) -> dict[str, Any]:
    """The settings of the template and the platform, by the trainer's names. Damaged images never
    end a task while one is readable. The trainer's own files are no results: the platform deletes
    them.
    """
    given = {
        flag: read(key, task.config[key])
        for key, (flag, read) in TEMPLATE.items()
        if is_given(task.config, key)
    }
    return {
        **given,
        "max_bad_fraction": 1.0,
        "output_dir": task.output.root_dir / "training",
        "tensorboard_dir": task.output.tensorboard_dir,
    }


def in_form_words(message: str) -> str:
    """A message with the form's fields in place of the trainer's settings and flags; a flag without
    a field is named with args_options, where it can be given.
    """
    if message.startswith("args_options"):
        return message
    fields = {flag: key for key, (flag, _) in TEMPLATE.items()}
    renamed = [flag for flag, key in fields.items() if flag != key]

    def field(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return fields.get(name, f"args_options --{match[1]}")

    message = message.replace("pass --", "set --").replace("Pass --", "Set --")
    message = re.sub(r"(?<![\w/-])--([a-z][\w-]*)", field, message)
    message = re.sub(r"(args_options --\S+(?: \w+)?) args_options (?=--)", r"\1 ", message)
    # Without dashes only where a setting is meant: a path or a class may have such a name.
    settings = "|".join(renamed)
    return re.sub(
        rf"^({settings})(?= is )|(?<= of )({settings})\b|(?<=at most )({settings})\b",
        lambda match: fields[match[0]],
        message,
    )
