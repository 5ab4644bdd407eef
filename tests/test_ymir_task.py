"""`env.yaml` and `config.yaml` of any make become one Task, or one line that says why not."""

import argparse
import ast
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_checkpoint import released_names
from tiny_runs import ROOT
from ymir_task import NAMES, PROTOCOLS, Tree, make_tree

from trainer.settings.parsing import parse, resolved
from vidt.images.preprocessing import Preprocessing
from vidt.model.vidt import ViDT, ViDTConfig
from vidt.weights.weights_file import WeightsInfo, save_weights
from ymir_adapter.protocol.environment import DEFAULT_ENV_FILE, read_identity
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.task import (
    TEMPLATE,
    CandidateSettings,
    Task,
    candidate_settings,
    fixed_fields,
    in_form_words,
    pick_weights,
    read_task,
    training_settings,
    wants_onnx,
)
from ymir_adapter.protocol.values import to_bool, to_float, to_int, to_list, to_text

SEED_TEMPLATE = {
    "epochs": 50,
    "learning_rate": 1e-4,
    "batch_size_per_gpu": 2,
    "num_workers_per_gpu": 2,
    "eval_size": 640,
    "backbone_name": "swin_nano",
    "weight_save_interval": 100,
    "args_options": "",
    "export_format": "ark:raw",
}
SEED_COMMAND = (
    "--method vidt --backbone_name swin_nano --epochs 50 --lr 1e-4 --min-lr 1e-7 --batch_size 2 "
    "--num_workers 2 --eval_size 640 --aux_loss True --with_box_refine True --dataset_file coco "
    "--num_classes 2 --coco_path DIR --output_dir DIR"
)
# What the two name differently by nature: the platform brings its own dataset and folders; the
# command line saves every epoch; one damaged image must not end a task on the platform.
OF_ITS_OWN = {
    *("dataset_file", "coco_path", "output_dir", "tensorboard_dir"),
    *("save_interval", "max_bad_fraction"),
}


def refused(work: Callable[[], Any]) -> TaskError:
    with pytest.raises(TaskError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_seeds_command_line_and_template_are_one_config(tmp_path: Path):
    asked = resolved(*parse(SEED_COMMAND.split()))
    task = make_tree(tmp_path, config=SEED_TEMPLATE).read()
    given = resolved(*training_settings(task))
    differing = {name for name in asked if asked[name] != given[name]}
    assert differing == OF_ITS_OWN
    assert set(asked) == set(given)
    print(f"{len(asked) - len(OF_ITS_OWN)} settings are equal, {sorted(OF_ITS_OWN)} differ")
    assert given["save_interval"] == 100
    assert given["tensorboard_dir"] == str(task.output.tensorboard_dir)
    assert Path(given["output_dir"]).parent == task.output.root_dir


def test_preset_auto_leaves_what_was_changed_in_the_form(tmp_path: Path):
    """Fields that stand as in the template are free; args_options and the platform's are not."""
    config = {"preset": "auto", "eval_size": 640, "epochs": 7, "args_options": "--lr 1e-3"}
    task = make_tree(tmp_path, config=config).read()
    fixed = fixed_fields(task)
    assert {"preset", "epochs", "lr", "output_dir", "tensorboard_dir"} <= fixed
    assert not {"eval_size", "backbone_name"} & fixed
    assert training_settings(task)[0].preset == "auto"


# ---------------------------------------------------------------- env.yaml


@pytest.mark.parametrize(
    ("protocol", "expected", "stages"),
    [
        (None, (0, 0, 0), False),
        ("1.0.0", (1, 0, 0), True),
        ("1.1.0", (1, 1, 0), True),
        ("2.0.0", (2, 0, 0), True),
        (1.0, (1, 0, 0), True),  # unquoted, YAML reads a number
        ("0.9", (0, 9, 0), False),
        ("newest", (1, 1, 0), True),  # with executor_log_file
    ],
)
def test_protocols(tmp_path: Path, protocol: Any, expected: tuple[int, ...], stages: bool):
    task = make_tree(tmp_path, protocol=protocol).read()
    assert (task.protocol, task.has_stages) == (expected, stages)


def test_an_unparsable_protocol_without_newer_keys_is_none(tmp_path: Path):
    tree = make_tree(tmp_path, protocol=None)
    tree.env["protocol_version"] = "newest"
    assert tree.write().read().protocol == (0, 0, 0)
    tree.env["manifest_file"] = "/img-man/manifest.yaml"
    assert tree.write().read().protocol == (1, 1, 0)


def test_numbers_nulls_and_unknown_keys_are_survived(tmp_path: Path):
    tree = make_tree(tmp_path, "mining+infer")
    tree.env |= {"task_id": 17, "run_mining": "True", "run_infer": 1, "colour": "red"}
    tree.env["input"] |= {"models_dir": None, "colour": 3, "training_index_file": None}
    tree.env["output"]["training_result_file"] = None
    task = tree.write().read()
    assert (task.task_id, task.run_mining, task.run_infer) == ("17", True, True)
    assert task.input.models_dir == tree.input / "models"
    assert task.output.training_result_file == tree.output / "models" / "result.yaml"


def test_paths_are_the_platforms_defaults_unless_given(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("class_names: [cat]\n")
    env = tmp_path / "env.yaml"
    env.write_text(f"run_infer: yes\ninput: {{config_file: {tmp_path}/config.yaml}}\n")
    task = read_task(env)
    assert task.task_id == "default-task"
    assert task.input.candidate_index_file == Path("/in/candidate-index.tsv")
    assert task.output.training_result_file == Path("/out/models/result.yaml")
    # The SDK's own documentation has paths that are relative to the root.
    env.write_text(f"run_infer: yes\ninput: {{root_dir: {tmp_path}, config_file: config.yaml}}\n")
    assert read_task(env).input.assets_dir == tmp_path / "assets"


def test_the_environment_variable_of_the_sdk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = make_tree(tmp_path)
    monkeypatch.setenv("DEFAULT_ENV_FILE_PATH", str(tree.env_file))
    assert read_task().task_id == "t0000001"
    assert read_identity() == ("t0000001", tree.output / "monitor.txt")
    monkeypatch.delenv("DEFAULT_ENV_FILE_PATH")
    assert DEFAULT_ENV_FILE in str(refused(read_task))


def test_training_wins_over_other_flags(tmp_path: Path):
    tree = make_tree(tmp_path)
    tree.env |= {"run_mining": True, "run_infer": True}
    task = tree.write().read()
    assert (task.run_training, task.run_mining, task.run_infer) == (True, False, False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run_training": False}, "run_training"),
        ({"run_training": "perhaps"}, "run_training"),
        ({"input": "/in"}, "input"),
        ({"output": ["/out"]}, "output"),
        ({"task_id": [1]}, "task_id"),
        ({"input": {"root_dir": {"a": 1}}}, "input.root_dir"),
        ({"input": {"config_file": "/nowhere/config.yaml"}}, "/nowhere/config.yaml"),
    ],
)
def test_a_broken_env_is_one_line(tmp_path: Path, change: dict[str, Any], named: str):
    tree = make_tree(tmp_path)
    tree.env |= change
    error = refused(tree.write().read)
    assert error.code == Code.CONFIG and named in str(error)


@pytest.mark.parametrize(
    "text", ["", "a: [1", "- 1\n- 2\n", "\x00", "task_id: t9\n\tx: 1", "run_training: yes\n\xa0: {"]
)
def test_env_files_that_are_no_settings(tmp_path: Path, text: str):
    path = tmp_path / "env.yaml"
    path.write_bytes(text.encode("latin-1"))
    error = refused(lambda: read_task(path))
    assert error.code == Code.CONFIG and str(path) in str(error)


def test_who_failed_is_known_even_of_a_broken_env(tmp_path: Path):
    path = tmp_path / "env.yaml"
    assert read_identity(path) == ("default-task", Path("/out/monitor.txt"))
    path.write_text(f"task_id: 'abc'\noutput:\n  monitor_file: {tmp_path}/m.txt\ninput: [\n")
    assert read_identity(path) == ("abc", tmp_path / "m.txt")
    path.write_text(f"task_id: abc\ninput: 3\noutput:\n  monitor_file: {tmp_path}/m.txt\n")
    assert read_identity(path) == ("abc", tmp_path / "m.txt")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (to_int, 8, 8),
        (to_int, "8", 8),
        (to_int, " 8 ", 8),
        (to_int, 8.0, 8),
        (to_int, "1e2", 100),
        (to_float, "1e-4", 1e-4),
        (to_float, 1, 1.0),
        (to_float, "0.5", 0.5),
        (to_bool, "True", True),
        (to_bool, "false", False),
        (to_bool, 0, False),
        (to_bool, "ON", True),
        (to_bool, 1.0, True),
        (to_text, 5, "5"),
        (to_text, " a ", "a"),
        (to_list, "[1,2]", [1, 2]),
        (to_list, "0, 1", ["0", "1"]),
        (to_list, 0, ["0"]),
        (to_list, "", []),
        (to_list, [1, "b"], [1, "b"]),
    ],
)
def test_values_are_taken(read: Callable[[str, object], Any], value: object, expected: object):
    assert read("some_key", value) == expected


BAD_VALUES = [
    *((to_int, value) for value in (True, "8.5", "eight", [8], None, "nan", 1e400, {}, 10**400)),
    *((to_float, value) for value in (False, "fast", "inf", float("nan"), [1.0], None, -(10**400))),
    *((to_bool, value) for value in ("maybe", 2, [True], None, {})),
    *((to_text, value) for value in ([1], {"a": 1}, None, "  ")),
    *((to_list, value) for value in ("[1, 2", "[2020-13-01]", {"a": 1}, None, True)),
]


@pytest.mark.parametrize(
    ("read", "value"), BAD_VALUES, ids=lambda part: getattr(part, "__name__", str(part))
)
def test_values_are_refused_with_the_key(read: Callable[[str, object], Any], value: object):
    error = refused(lambda: read("some_key", value))
    assert error.code == Code.CONFIG and "some_key" in str(error)


# ---------------------------------------------------------------- config.yaml: hazards of 5.1


@pytest.mark.parametrize(
    ("config", "field", "expected"),
    [
        # typed into a web form
        ({"epochs": "8"}, "epochs", 8),
        ({"learning_rate": "1e-4"}, "lr", 1e-4),
        ({"args_options": "--aux_loss 'True'"}, "aux_loss", True),
        # a cleared number field, and keys that forms drop
        ({"epochs": None}, "epochs", 50),
        ({"learning_rate": None, "batch_size_per_gpu": None}, "lr", 1e-4),
        ({"backbone_name": ""}, "backbone_name", "swin_nano"),
        ({"args_options": None}, "batch_size", 2),
        ({"num_workers_per_gpu": 0}, "num_workers", 0),
        ({"batch_size_per_gpu": 4.0}, "batch_size", 4),
        # flags of the trainer, with shell quoting, win over the template
        ({"epochs": 8, "args_options": "--epochs 3"}, "epochs", 3),
        ({"args_options": "--train_sizes '480 512' --no-flip"}, "train_sizes", [480, 512]),
        ({"learning_rate": 1e-3, "args_options": "--min-lr=1e-3"}, "min_lr", 1e-3),
        ({"args_options": "--max_bad_fraction 0.1"}, "max_bad_fraction", 0.1),
        ({"pre_trained": "none"}, "pre_trained", "none"),
        ({"shm_size": "16G", "openpai_enable": "", "gpu_count": "0"}, "epochs", 50),
    ],
    ids=str,
)
def test_settings_of_a_form(tmp_path: Path, config: dict[str, Any], field: str, expected: Any):
    task = make_tree(tmp_path, config=config).read()
    assert resolved(*training_settings(task))[field] == expected


def test_a_config_file_of_args_options_wins_over_the_template(tmp_path: Path):
    more = tmp_path / "more.yaml"
    more.write_text("batch_size: 4\nn_iter_to_acc: 4\n")
    config = {"batch_size_per_gpu": 2, "epochs": 7, "args_options": f"--config {more}"}
    settings, _ = training_settings(make_tree(tmp_path, config=config).read())
    assert (settings.batch_size, settings.n_iter_to_acc, settings.epochs) == (4, 4, 7)


BAD_CONFIGS = [
    ({"epochs": "ten"}, "epochs"),
    ({"epochs": 0}, "epochs"),
    ({"learning_rate": "fast"}, "learning_rate"),
    ({"learning_rate": -1.0}, "learning_rate"),
    ({"batch_size_per_gpu": 0}, "batch_size_per_gpu"),
    ({"batch_size_per_gpu": True}, "batch_size_per_gpu"),
    ({"num_workers_per_gpu": [2]}, "num_workers_per_gpu"),
    ({"eval_size": 5}, "eval_size"),
    ({"eval_size": "nan"}, "eval_size"),
    ({"weight_save_interval": 0.5}, "weight_save_interval"),
    ({"backbone_name": "resnet50"}, "backbone_name"),
    ({"backbone_name": ["swin_nano"]}, "backbone_name"),
    ({"method": "yolo"}, "method"),
    ({"args_options": "--colour red"}, "colour"),
    ({"args_options": "--coco_path /data"}, "coco_path"),
    ({"args_options": "--epff --with_vector"}, "with_vector"),
    ({"args_options": "--report_to wandb"}, "report_to"),
    ({"args_options": "--epochs"}, "epochs"),
    ({"args_options": "--epochs 'three"}, "args_options"),
    ({"args_options": "--help"}, "help"),
    ({"args_options": "--check"}, "check"),
    ({"args_options": "--eval --load_from x"}, "eval"),
    ({"args_options": "--num_classes 7"}, "num_classes"),
    ({"args_options": "50"}, "50"),
    ({"args_options": ["--epochs", 3]}, "args_options"),
    ({"args_options": "--load_from a --resume b"}, "resume"),
]


@pytest.mark.parametrize(("config", "named"), BAD_CONFIGS, ids=str)
def test_bad_settings_are_one_line_naming_the_key(
    tmp_path: Path, config: dict[str, Any], named: str
):
    task = make_tree(tmp_path, config=config).read()
    error = refused(lambda: training_settings(task))
    assert error.code == Code.CONFIG and named in str(error)


def test_an_export_that_the_image_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not wants_onnx(make_tree(tmp_path / "a").read())
    assert not wants_onnx(make_tree(tmp_path / "b", config={"export_onnx": "False"}).read())
    task = make_tree(tmp_path / "c", config={"export_onnx": "yes"}).read()
    monkeypatch.setattr("ymir_adapter.protocol.task.EXPORT_PACKAGES", ("json", "nosuchpackage"))
    error = refused(lambda: wants_onnx(task))
    assert error.code == Code.CONFIG and "export_onnx needs nosuchpackage" in str(error)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (None, None)),
        ({"img_size": "auto", "class_distribution": "equal"}, (None, None)),
        ({"img_size": "800", "class_distribution": "1, 0.5"}, (800, (1.0, 0.5))),
        ({"img_size": 320, "class_distribution": [0, 2]}, (320, (0.0, 2.0))),
    ],
)
def test_sizes_and_class_weights_of_candidates(tmp_path: Path, config: dict, expected: tuple):
    settings = candidate_settings(make_tree(tmp_path, "mining", config=config).read())
    assert (settings.img_size, settings.class_distribution) == expected


@pytest.mark.parametrize(
    "config",
    [
        *({"img_size": value} for value in (16, 10**9, "big", -1, 1.5)),
        *({"class_distribution": value} for value in ("1", "1,2,3", "0,0", "-1,1", "a,b", "nan,1")),
    ],
    ids=str,
)
def test_sizes_and_class_weights_that_are_none(tmp_path: Path, config: dict):
    task = make_tree(tmp_path, "mining", config=config).read()
    error = refused(lambda: candidate_settings(task))
    assert error.code == Code.CONFIG and next(iter(config)) in str(error)


def test_messages_name_fields_of_the_form() -> None:
    """Every text of an exception or log line in the trainer and the detector, except of commands:
    a flag that is a field has the field's name, any other is named with args_options.
    """
    flags = {flag for flag, _ in TEMPLATE.values()}
    with_fields = with_others = 0
    for text in spoken_texts():
        said = in_form_words(text)
        assert not re.search(rf"--({'|'.join(flags)})\b", said), text
        for flag in re.finditer(r"(?<!\S)--[a-z][\w-]*", said):
            assert "args_options --" in said[: flag.end()], text
        with_others += "args_options" in said
        with_fields += said != text and "args_options" not in said
    assert with_fields > 3 and with_others > 8


def spoken_texts() -> Iterator[str]:
    """Of raise statements and calls of loggers; values in f-strings are "x"."""
    for package in ("trainer", "vidt"):
        for path in (ROOT / package).rglob("*.py"):
            if path.parent.name == "commands" or path.name in ("convert.py", "launch.py"):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                is_log = isinstance(node, ast.Call) and "logger." in ast.unparse(node.func)
                for part in ast.walk(node) if is_log or isinstance(node, ast.Raise) else ():
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value
                    if isinstance(part, ast.JoinedStr):
                        values = (getattr(each, "value", "") for each in part.values)
                        yield "".join(v if isinstance(v, str) else "x" for v in values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size is 0; it must", "batch_size_per_gpu is 0; it must"),
        ("a divisor of batch_size, 2", "a divisor of batch_size_per_gpu, 2"),
        (
            "min_lr is 1; it must be at most lr, 0.1",
            "min_lr is 1; it must be at most learning_rate, 0.1",
        ),
        (
            "--batch_size 4 is now split. Pass --n_iter_to_acc 2 to",
            "batch_size_per_gpu 4 is now split. Set args_options --n_iter_to_acc 2 to",
        ),
        (
            "/in/lr/my--lr.jpg: damaged; lr, batch_size",
            "/in/lr/my--lr.jpg: damaged; lr, batch_size",
        ),
        ("args_options: --epochs has no value", "args_options: --epochs has no value"),
    ],
)
def test_words_of_the_form(text: str, said: str) -> None:
    assert in_form_words(text) == said


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ()),
        (None, ()),
        ("0", (0,)),
        (0, (0,)),
        ("0,1", (0, 1)),
        ("0, 1 ", (0, 1)),
        ([0, 1], (0, 1)),
        ("[0, 1]", (0, 1)),
        (["0"], (0,)),
    ],
)
def test_gpu_ids(tmp_path: Path, value: object, expected: tuple[int, ...]):
    assert make_tree(tmp_path, config={"gpu_id": value}).read().gpu_ids == expected


@pytest.mark.parametrize("value", ["all", "0,0", "-1", 0.5, True, {"a": 1}, "0-1"])
def test_gpu_ids_that_are_none(tmp_path: Path, value: object):
    error = refused(make_tree(tmp_path, config={"gpu_id": value}).read)
    assert error.code == Code.CONFIG and "gpu_id" in str(error)


def test_a_missing_gpu_id_is_made_of_the_count(tmp_path: Path):
    tree = make_tree(tmp_path)
    del tree.config["gpu_id"]
    assert tree.write().read().gpu_ids == ()
    tree.config["gpu_count"] = "2"
    assert tree.write().read().gpu_ids == (0, 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, True, "a b"], ("1", "True", "a b")),
        ("cat", ("cat",)),
        ("[cat, dog]", ("cat", "dog")),
        (["K\u00e4fer", "a/b", "it's"], ("K\u00e4fer", "a/b", "it's")),
    ],
)
def test_class_names(tmp_path: Path, value: object, expected: tuple[str, ...]):
    assert make_tree(tmp_path, config={"class_names": value}).read().class_names == expected


@pytest.mark.parametrize(
    "value", [None, [], "", ["cat", "cat"], [["cat"]], {"cat": 1}, ["a", None]]
)
def test_class_names_that_are_none(tmp_path: Path, value: object):
    error = refused(make_tree(tmp_path, config={"class_names": value}).read)
    assert error.code == Code.CONFIG and "class_names" in str(error)


@pytest.mark.parametrize("value", [2, "2", None])
def test_detection_is_taken(tmp_path: Path, value: object):
    assert make_tree(tmp_path, config={"object_type": value}).read().class_names == NAMES


@pytest.mark.parametrize("value", [3, "4", 50])
def test_other_object_types_are_refused(tmp_path: Path, value: object):
    error = refused(make_tree(tmp_path, config={"object_type": value}).read)
    assert error.code == Code.OBJECT_TYPE


def test_live_code_gives_defaults_below_the_config(tmp_path: Path):
    defaults = tmp_path / "defaults.yaml"
    defaults.write_text("epochs: 3\neval_size: 320\n")
    tree = make_tree(tmp_path, config={"code_config": str(defaults), "epochs": 5})
    config, _ = training_settings(tree.read())
    assert (config.epochs, config.eval_size) == (5, 320)
    defaults.unlink()
    assert str(defaults) in str(refused(tree.read))


# ---------------------------------------------------------------- mining and inference


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_missing_keys_are_the_defaults(tmp_path: Path, protocol: str | None):
    task = make_tree(tmp_path, "mining+infer", protocol=protocol).read()
    assert candidate_settings(task) == CandidateSettings()
    assert not task.run_training and task.has_stages == (protocol is not None)


def test_no_default_is_falsy_but_where_a_missing_key_means_that():
    falsy = {name for name, value in vars(CandidateSettings()).items() if not value}
    assert falsy == {"class_balance", "img_size", "class_distribution"}
    for name in ("mining", "infer"):
        template = ROOT / f"ymir_adapter/templates/{name}-template.yaml"
        assert all(yaml.safe_load(template.read_text()).values()), "the form would drop it"


def test_candidate_settings_are_coerced(tmp_path: Path):
    config = {
        "conf_threshold": "5e-3",
        "batch_size_per_gpu": "16",
        "num_workers_per_gpu": None,
        "mining_algorithm": "CALD",
        "class_balance": "True",
        "seed": 7.0,
        "mixed_precision": "BF16",
    }
    found = candidate_settings(make_tree(tmp_path, "mining", config=config).read())
    assert found == CandidateSettings(0.005, 16, 2, "cald", True, 7, "bf16")


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "auto"), ({"mixed_precision": "no"}, "no"), ({"mixed_precision": False}, "no")],
)
def test_the_precision_of_every_task(tmp_path: Path, given: dict[str, object], expected: str):
    """YAML reads an unquoted `no` as False."""
    training = make_tree(tmp_path / "training", config=given).read()
    assert training_settings(training)[0].mixed_precision == expected
    mining = make_tree(tmp_path / "mining", "mining", config=given).read()
    assert candidate_settings(mining).mixed_precision == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("conf_threshold", 1.5),
        ("conf_threshold", "low"),
        ("conf_threshold", "nan"),
        ("batch_size_per_gpu", 0),
        ("num_workers_per_gpu", -1),
        ("mining_algorithm", "best"),
        ("mining_algorithm", ["cald"]),
        ("class_balance", "a bit"),
        ("mixed_precision", "fp8"),
        ("seed", -3),
    ],
)
def test_candidate_settings_that_cannot_be(tmp_path: Path, key: str, value: object):
    task = make_tree(tmp_path, "mining", config={key: value}).read()
    error = refused(lambda: candidate_settings(task))
    assert error.code == Code.CONFIG and key in str(error)


# ---------------------------------------------------------------- weights


def weights(path: Path, map50: float) -> Path:
    info = WeightsInfo(ViDTConfig(num_classes=2), NAMES, Preprocessing(64), {"map50": map50})
    save_weights(path, {"x": torch.zeros(1)}, info)
    return path


def with_weights(tree: Tree, value: object, key: str = "") -> Task:
    training = tree.env["run_training"]
    tree.config[key or ("pretrained_model_params" if training else "model_params_path")] = value
    return tree.write().read()


@pytest.mark.parametrize("task", ["training", "mining", "infer"])
@pytest.mark.parametrize("form", [list, lambda paths: paths[0], str])
def test_weights_are_a_list_or_text(tmp_path: Path, task: str, form: Callable[[list[str]], Any]):
    path = weights(tmp_path / "in" / "w, 1.safetensors", 0.5)
    found = with_weights(make_tree(tmp_path, task), form([str(path)]))
    assert found.weights == (path,) and pick_weights(found) == path


def test_the_alias_of_the_templates_comes_last(tmp_path: Path):
    tree = make_tree(tmp_path)
    first, second = (weights(tmp_path / name, 0.5) for name in ("a.safetensors", "b.safetensors"))
    assert with_weights(tree, [str(second)], "pretrained_model_paths").weights == (second,)
    assert with_weights(tree, [str(first)]).weights == (first,)


def test_packages_of_old_platforms_lie_flat(tmp_path: Path):
    tree = make_tree(tmp_path, "infer")
    flat = weights(tree.input / "models" / "w.safetensors", 0.5)
    listed = tree.input / "models" / "default_best_stage" / "w.safetensors"
    assert with_weights(tree, [str(listed)]).weights == (flat,)


def test_ours_is_told_by_content_and_the_best_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tree = make_tree(tmp_path, "infer")
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"not weights at all")
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "yolo.pt")
    low, nan = weights(tmp_path / "low.bin", 0.2), weights(tmp_path / "nan.bin", float("nan"))
    best = weights(tmp_path / "best.bin", 0.7)
    paths = [foreign, tmp_path / "yolo.pt", low, nan, best, tmp_path / "gone.pth"]
    with caplog.at_level(logging.INFO):
        assert pick_weights(with_weights(tree, [str(path) for path in paths])) == best
    assert str(best) in caplog.text


@pytest.mark.parametrize("task", ["training", "mining"])
def test_weights_that_cannot_be_used(tmp_path: Path, task: str):
    tree = make_tree(tmp_path, task)
    foreign = tmp_path / "model.pth"
    foreign.write_bytes(b"junk")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights(tmp_path / "whole.safetensors", 0.5).read_bytes()[:-3])
    bad = [[str(tmp_path / "gone.pth")], [str(foreign)], [str(cut)], [str(foreign), str(cut)]]
    for listed in bad:
        error = refused(lambda listed=listed: pick_weights(with_weights(tree, listed)))
        assert error.code == Code.MODEL
        assert Path(listed[-1]).name in str(error)
    print(f"{len(bad)} lists of bad weights")


def test_the_predecessors_weights_start_a_training_and_serve_nothing_else(tmp_path: Path):
    small = ViDTConfig(num_classes=2, det_token_num=5, dec_layers=1, dim_feedforward=64)
    path = tmp_path / "checkpoint0049.pth"
    options = argparse.Namespace(backbone_name="swin_nano", lr=1e-4)
    torch.save({"model": released_names(ViDT(small)), "args": options, "epoch": 49}, path)
    listed = [str(tmp_path / "result.yaml"), str(path)]
    (tmp_path / "result.yaml").write_text("model_stages: {}\n")
    assert pick_weights(with_weights(make_tree(tmp_path / "a"), listed)) == path
    task = with_weights(make_tree(tmp_path / "b", "infer"), listed)  # it names no classes
    assert refused(lambda: pick_weights(task)).code == Code.MODEL


@pytest.mark.parametrize("header", [{"format": "vidt-weights-1"}, {"format": "other"}, {}])
def test_a_header_that_says_too_little(tmp_path: Path, header: dict[str, str]):
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=header)
    task = with_weights(make_tree(tmp_path / "a", "infer"), [str(path)])
    error = refused(lambda: pick_weights(task))
    assert error.code == Code.MODEL and str(path) in str(error)


def test_no_weights_is_from_scratch_or_an_error(tmp_path: Path):
    assert pick_weights(make_tree(tmp_path / "a").read()) is None
    error = refused(lambda: pick_weights(make_tree(tmp_path / "b", "infer").read()))
    assert error.code == Code.MODEL and "model_params_path" in str(error)


def test_args_options_choose_the_start_before_the_platform(tmp_path: Path):
    given = weights(tmp_path / "given.safetensors", 0.5)
    tree = make_tree(tmp_path)
    assert training_settings(with_weights(tree, [str(given)]))[0].load_from == str(given)
    tree.config["args_options"] = "--load_from other.pth"
    assert training_settings(tree.write().read())[0].load_from == "other.pth"
    tree.config["args_options"] = "--resume"
    config, _ = training_settings(tree.write().read())
    assert (config.load_from, config.resume) == (str(given), None), "there is nothing to resume"
    (Path(config.output_dir) / "checkpoints/step-00000001").mkdir(parents=True)
    config, _ = training_settings(tree.write().read())
    assert (config.load_from, config.resume) == (None, "auto")
