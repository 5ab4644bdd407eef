"""The command line of a training run: flags and files to its settings, and back.

Every setting has one owner: architecture in `vidt.ViDTConfig` (saved with the weights),
optimisation, data and precision in `TrainConfig`, machines in accelerate's own file. A flag
overrides the `--config` file, which overrides the dataset's recipe (`recipes/<dataset_file>.yaml`),
which overrides the default of the dataclass.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from trainer.settings.config import TrainConfig
from trainer.settings.flags import (
    ConfigError,
    HelpRequested,
    help_lines,
    read_flags,
    read_value,
    read_yaml,
    settings_of,
)
from trainer.settings.limits import (
    COCO_FILES,
    DATASETS,
    NEED_REFINEMENT,
    PATH_OF,
    WEIGHTS_OWN,
    check_data_path,
)
from trainer.settings.other_names import ELSEWHERE
from trainer.settings.yaml_text import BadYAML, read_limited
from vidt.atomic import atomic_write
from vidt.errors import UserError, escaped, shown
from vidt.model.config import ViDTConfig
from vidt.weights.published import PUBLISHED, is_remote, published_for

_TRAIN = settings_of(TrainConfig)
_MODEL = settings_of(ViDTConfig)
# The data can determine this architectural value; None means that it was not given.
_MODEL["num_classes"] = replace(_MODEL["num_classes"], optional=True, default=None)
_ALL = {**_TRAIN, **_MODEL}
assert len(_ALL) == len(_TRAIN) + len(_MODEL), "a setting has two owners"


def parse(argv: Sequence[str], *, own_data: bool = False) -> tuple[TrainConfig, dict[str, Any]]:
    """Parses flags to a run's settings and the fields of its ViDTConfig.

    `num_classes` is None unless given, since the data determines it; with --eval `dec_layers` is
    too, since the weights determine it. With `own_data` the caller supplies the samples: no recipe
    applies and no path is required. Raises ConfigError, and HelpRequested for `--help`.
    """
    given = given_settings(argv)
    if any(given.get(name) is not None for name in COCO_FILES):
        given.setdefault("dataset_file", "coco")
    for name, path in PATH_OF.items():
        if given.get(path) is not None:
            given.setdefault("dataset_file", name)
    if given.get("eval"):
        given.setdefault("eval_size", WEIGHTS_OWN)
        given.setdefault("dec_layers", None)
    elif given.get("data") is not None:
        given.setdefault("preset", "auto")
    published = _architecture_of(given.get("load_from"))
    recipe: dict[str, Any] = {}
    if not own_data and given.get("preset") != "auto":
        recipe = _fitting(_read_recipe(given.get("dataset_file", TrainConfig.dataset_file)), given)
    given = {**recipe, **published, **given}
    try:
        return _checked(given, own_data)
    except ConfigError as error:
        if given.get("config") is None:
            raise
        raise ConfigError(f"{error} (--config {shown(given['config'], 300)} was read)") from None


def fixed_settings(argv: Sequence[str]) -> frozenset[str]:
    """The names of settings that are given, or that follow from the published model given with
    --load_from: `--preset auto` leaves them alone.
    """
    given = given_settings(argv)
    return frozenset({**_architecture_of(given.get("load_from")), **given})


def _architecture_of(load_from: str | None) -> dict[str, Any]:
    """The model's settings that --load_from with the name of a published model stands for."""
    if load_from not in PUBLISHED or not is_remote(load_from):
        return {}
    defaults = {name: setting.default for name, setting in _MODEL.items()}
    return {**defaults, **PUBLISHED[load_from].architecture}


def _checked(given: Mapping[str, Any], own_data: bool) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings given and the defaults of the others. Raises ConfigError."""
    config = TrainConfig(**{name: given[name] for name in _TRAIN if name in given})
    model = {name: given.get(name, setting.default) for name, setting in _MODEL.items()}
    check_model(model)
    if config.pre_trained == "coco" and config.load_from is None and config.resume is None:
        _check_published(model)
    if not own_data:
        check_data_path(config)
    return config, model


def given_settings(argv: Sequence[str]) -> dict[str, Any]:
    """The settings given as flags or in the `--config` file, without defaults. Raises ConfigError
    and HelpRequested.
    """
    given = read_flags(argv, _ALL, ELSEWHERE)
    if given.get("config") is not None:
        read = _read_config(given["config"])
        if given.get("resume") is not None:
            read.pop("load_from", None)  # the checkpoint replaces the starting weights
        if read.get("hours") is not None and given.keys() & {"hours", "epochs", "max_steps"}:
            del read["hours"]  # and what a trial found for them
            read.pop("max_steps", None)
        given = {**read, **given}
    return given


def in_words(name: str, value: Any) -> str:
    """The value of a setting as its flag takes it."""
    raw = _ALL[name].as_yaml(value)
    return " ".join(map(str, raw)) if isinstance(raw, list) else str(raw)


def read_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run saved, as `resolved` gives them, without those that are unknown
    here. Raises ConfigError.
    """
    return {
        name: read_value(_ALL[name], raw, f"the run to resume: {name}")
        for name, raw in saved.items()
        if name in _ALL
    }


def _read_config(path: str) -> dict[str, Any]:
    try:
        text = read_limited(path).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"config {shown(path, 300)} cannot be read: {error.strerror}") from None
    except BadYAML as error:
        raise ConfigError(f"config {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {shown(path, 300)} cannot be read: it is not text") from None
    except ValueError as error:  # a zero byte in the name
        raise ConfigError(f"config {shown(path, 300)} cannot be read: {error}") from None
    nestable = {name: setting for name, setting in _ALL.items() if name != "config"}
    return read_yaml(text, nestable, path, ELSEWHERE)


def _read_recipe(dataset_file: str) -> dict[str, Any]:
    """The recipe of a dataset; empty if it has none."""
    if dataset_file not in DATASETS:  # reported with the other values
        return {}
    recipe = resources.files("trainer.settings") / "recipes" / f"{dataset_file}.yaml"
    if not recipe.is_file():
        return {}
    return read_yaml(recipe.read_text(encoding="utf-8"), _ALL, str(recipe))


def _fitting(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what the given architecture cannot have."""
    method, layers = given.get("method", "vidt"), given.get("dec_layers", 1)
    refines = method == "vidt" and layers != 0 and given.get("with_box_refine", True)
    left_out = () if refines else NEED_REFINEMENT
    if method != "vidt":
        left_out = (*left_out, "class_loss")
    return {name: value for name, value in recipe.items() if name not in left_out}


def check_model(model: Mapping[str, Any]) -> None:
    """Raises ConfigError if ViDTConfig raises. Its defaults stand in for fields that the data
    or the weights determine later.
    """
    try:
        ViDTConfig(**{name: value for name, value in model.items() if value is not None})
    except UserError as error:
        raise ConfigError(str(error)) from None


def _check_published(model: Mapping[str, Any]) -> None:
    try:
        published_for(model["backbone_name"], method=model["method"], epff=model["epff"])
    except UserError as error:
        raise ConfigError(str(error)) from None


def parse_or_exit(argv: Sequence[str] | None = None) -> tuple[TrainConfig, dict[str, Any]]:
    """`parse` for a program: ends it with one line and code 2 on an error, with 0 on `--help`."""
    try:
        return parse(sys.argv[1:] if argv is None else argv)
    except HelpRequested:
        sys.stdout.write(help_text())
        sys.exit(0)
    except ConfigError as error:
        sys.stderr.write(f"error: {escaped(str(error))}\n")
        sys.exit(2)


def help_text() -> str:
    """All flags by group, with defaults and descriptions."""
    lines = [
        "Flags may have - or _. --NAME alone means True, --no-NAME False.",
        "Flags override --config FILE, then the dataset's recipe, then the defaults shown.",
        "",
        *help_lines(_TRAIN),
        "",
        "Architecture:",
        *help_lines(_MODEL),
    ]
    return "\n".join(lines) + "\n"


def resolved(config: TrainConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run as YAML values, except those of a single start, such as --resume."""
    owned = [name for name, setting in _TRAIN.items() if setting.metadata.get("saved", True)]
    values = {name: getattr(config, name) for name in owned} | {
        name: model[name] for name in _MODEL
    }
    return {name: _ALL[name].as_yaml(value) for name, value in values.items()}


def default_settings() -> dict[str, Any]:
    """The defaults of all settings, as `resolved` gives them."""
    return {name: setting.as_yaml(setting.default) for name, setting in _ALL.items()}


def write_yaml(path: str | Path, config: TrainConfig, model: Mapping[str, Any]) -> None:
    """Writes the file with which `--config` repeats the run."""
    text = yaml.safe_dump(resolved(config, model), sort_keys=False)
    atomic_write(path, f"# All settings of a run: --config THIS_FILE repeats it.\n{text}".encode())
