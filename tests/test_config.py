import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import yaml

from trainer.settings.config import TrainConfig
from trainer.settings.flags import ConfigError, HelpRequested, read_flags, settings_of
from trainer.settings.limits import AUTO
from trainer.settings.other_names import ELSEWHERE
from trainer.settings.parsing import help_text, parse, parse_or_exit, resolved, write_yaml
from vidt.model.vidt import ViDTConfig

COCO = ["--dataset_file", "coco", "--coco_path", "somewhere"]
FOUR_FILES = ["--train_json=a.json", "--train_images=a", "--val_json=b.json", "--val_images=b"]
PREDECESSOR = """--method vidt --backbone_name swin_nano --epochs 50 --lr 1e-4 --min-lr 1e-7
    --batch_size 2 --num_workers 2 --eval_size 640 --aux_loss True --with_box_refine True
    --dataset_file coco --num_classes 80 --coco_path DIR --output_dir OUT
    --save_interval 5 --tensorboard_dir EVENTS"""


def both(argv: list[str]) -> dict:
    """All settings by name, whoever owns them."""
    config, model = parse(argv)
    return {**vars(config), **model}


def message(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        parse(argv)
    text = str(error.value)
    assert text and "\n" not in text
    return text


@dataclass(frozen=True)
class Toy:
    shift: float = 0.0
    steps: tuple[int, ...] = (1,)
    names: tuple[str, ...] | None = None
    loud: bool = False


def toy(*argv: str) -> dict:
    return read_flags(argv, settings_of(Toy))


def test_the_predecessors_command_line():
    settings = both(PREDECESSOR.split())
    expected = {
        "method": "vidt",
        "backbone_name": "swin_nano",
        "epochs": 50,
        "lr": 1e-4,
        "min_lr": 1e-7,
    }
    expected |= {"batch_size": 2, "num_workers": 2, "eval_size": 640, "aux_loss": True}
    expected |= {
        "with_box_refine": True,
        "dataset_file": "coco",
        "num_classes": 80,
        "coco_path": "DIR",
    }
    expected |= {"output_dir": "OUT", "save_interval": 5, "tensorboard_dir": "EVENTS"}
    assert {name: settings[name] for name in expected} == expected
    started = both([*PREDECESSOR.split(), "--load_from", "weights.pth", "--eval"])
    assert (started["load_from"], started["eval"]) == ("weights.pth", True)
    assert both([*PREDECESSOR.split(), "--resume", "OUT"])["resume"] == "OUT"


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--min-lr 1e-6", "min_lr", 1e-6),
        ("--min_lr=1e-6", "min_lr", 1e-6),
        ("--lr 1", "lr", 1.0),
        ("--flip", "flip", True),
        ("--no-flip", "flip", False),
        ("--no_flip", "flip", False),
        ("--flip False", "flip", False),
        ("--with-box-refine no", "with_box_refine", False),
        ("--ema=0", "ema", False),
        ("--ema yes", "ema", True),
        ("--flip --check", "check", True),
        ("--resume --eval", "resume", "auto"),
        ("--resume here", "resume", "here"),
        ("--train_sizes none", "train_sizes", None),
        ("--train_sizes 96 128", "train_sizes", (96, 128)),
        ("--train_sizes 96,128", "train_sizes", (96, 128)),
        ("--train-sizes [96]", "train_sizes", (96,)),
        ("--cross_indices 2 3", "cross_indices", (2, 3)),
        ("--cross_indices []", "cross_indices", ()),
        ("--max_steps None", "max_steps", None),
        ("--pre_trained none", "pre_trained", "none"),
        ("--num_classes none", "num_classes", None),
        ("--epochs 3 --epochs 4", "epochs", 4),
        ("--output_dir=a=b", "output_dir", "a=b"),
    ],
)
def test_ways_to_write_a_flag(flags: str, name: str, value: object):
    found = both(flags.split())[name]
    assert found == value
    assert type(found) is type(value)


def test_values_that_begin_with_a_minus_or_hold_spaces():
    assert toy("--shift", "-1e-4") == {"shift": -1e-4}
    assert toy("--shift", "-.5", "--loud") == {"shift": -0.5, "loud": True}
    assert toy("--steps", "-1", "-2") == {"steps": (-1, -2)}
    assert toy("--steps", "[-1, 2]") == {"steps": (-1, 2)}
    assert toy("--names", "none") == {"names": None}
    assert both(["--output_dir", "my results"])["output_dir"] == "my results"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--min-rl 1", ["--min-rl", "the nearest is --min_lr"]),
        ("--batchsize 1", ["--batchsize", "the nearest is --batch_size"]),
        ("--epoch 1", ["--epoch;", "the nearest is --epochs"]),
        ("--no-flipp", ["--no-flipp", "the nearest is --no_flip"]),
        ("-lr 1", ["-lr", "the nearest is --lr"]),
        ("--no-lr", ["unknown flag --no-lr"]),
        ("--no-flip True", ["--no_flip takes no value", "True"]),
        ("--lr fast", ["--lr is 'fast'", "a number"]),
        ("--lr nan", ["--lr is 'nan'", "a number"]),
        ("--lr 1 2", ["--lr takes one value", "1 2"]),
        ("--lr", ["--lr has no value", "a number"]),
        ("--epochs 1.5", ["--epochs is '1.5'", "a whole number"]),
        ("--max_steps soon", ["--max_steps is 'soon'", "a whole number or none"]),
        ("--flip maybe", ["--flip is 'maybe'", "True or False"]),
        (
            "--train_sizes 96 large",
            ["--train_sizes is '96 large'", "whole numbers, such as 2,3 or none"],
        ),
        ("--output_dir=", ["--output_dir is ''", "text"]),
        ("somewhere", ["'somewhere'", "--name value"]),
        ("--config missing.yaml", ["missing.yaml", "No such file"]),
    ],
)
def test_a_flag_that_cannot_be_read(flags: str, parts: list[str]):
    text = message(flags.split())
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--epochs 0", "epochs is 0; it must be 1 or more"),
        ("--lr 0", "lr is 0.0; it must be above 0"),
        ("--lr -1e-4", "lr is -0.0001; it must be above 0"),
        ("--lr 0.5 --min_lr 1", "min_lr is 1.0; it must be at most lr, 0.5"),
        ("--seed -1", "seed is -1; it must be 0 or more"),
        ("--max_steps 0", "max_steps is 0; it must be 1 or more"),
        ("--ema_decay 1", "ema_decay is 1.0; it must be 0 or more and below 1, or auto"),
        ("--lr_backbone_mult -1", "lr_backbone_mult is -1.0; it must be 0 or more"),
        ("--lr_fan_in_power 3", "lr_fan_in_power is 3.0; it must be from 0 to 2"),
        ("--adam_beta2 1", "adam_beta2 is 1.0; it must be 0 or more and below 1"),
        ("--sched step", "sched is step; it must be one of cosine, linear, flat_cosine"),
        ("--scale_per batch", "scale_per is batch; it must be one of step, image"),
        ("--max_bad_fraction 1.1", "max_bad_fraction is 1.1; it must be from 0 to 1"),
        ("--eval_size 31", "eval_size is 31; it must be 32 or more"),
        ("--eval --eval_size 31", "eval_size is 31; it must be 32 or more"),
        ("--eval_size 0", "eval_size is 0; it must be 32 or more"),
        ("--eval --val_json a", "val_json is given without val_images; give both"),
        ("--train_sizes 64 16", "train_sizes is 16; it must be 32 or more"),
        ("--train_sizes []", "train_sizes is empty; it must be one size or more, or none"),
        (
            "--batch_size 8 --n_iter_to_acc 3",
            "n_iter_to_acc is 3; it must be a divisor of batch_size, 8",
        ),
        ("--batch_size 0", "batch_size is 0; it must be 1 or more, or auto"),
        ("--batch_size -1", "--batch_size is '-1'; it must be a whole number or auto"),
        ("--batch_size auto --eval", "batch_size is auto; with eval it must be a number"),
        (
            "--batch_size auto --n_iter_to_acc 2",
            "batch_size is auto; with n_iter_to_acc 2 it must be a number",
        ),
        (
            "--dataset_file coko",
            "dataset_file is coko; it must be one of shapes, coco, voc, yolo, auto",
        ),
        ("--dataset_file voc", "--dataset_file voc needs a path; give voc_path"),
        (
            "--dataset_file voc --voc_path a --coco_path b",
            "coco_path is for dataset_file coco; it is voc",
        ),
        (
            "--load_from a --resume b",
            "--load_from and --resume exclude each other; drop --load_from",
        ),
        (
            "--train_json a",
            "train_json is given without train_images, val_json, val_images; give all four",
        ),
        (
            " ".join(FOUR_FILES) + " --dataset_file voc",
            "train_json is for dataset_file coco; it is voc",
        ),
    ],
)
def test_a_value_that_no_run_can_have(flags: str, expected: str):
    assert message(flags.split()) == expected


def test_a_word_that_stands_for_a_number_is_written_as_the_word(tmp_path: Path):
    config, model = parse(["--batch_size", "Auto"])
    assert config.batch_size == AUTO
    write_yaml(tmp_path / "config.yaml", config, model)
    assert "batch_size: auto" in (tmp_path / "config.yaml").read_text()
    assert parse(["--config", str(tmp_path / "config.yaml")])[0] == replace(
        config, config=str(tmp_path / "config.yaml")
    )


def test_what_the_model_refuses_is_refused_at_once():
    assert "dropout" in message(["--dropout", "2"])
    assert "swin_nano" in message(["--backbone_name", "resnet50"])
    assert "num_classes" in message(["--num_classes", "0"])


def test_without_a_path_coco_names_its_flags():
    text = message(["--dataset_file", "coco"])
    assert all(name in text for name in ("coco_path", "train_json", "val_images"))


def test_four_files_are_a_coco_dataset_without_the_recipe_of_the_shapes():
    settings = both(FOUR_FILES)
    assert settings["dataset_file"] == "coco"
    assert settings["eval_size"] == TrainConfig().eval_size


def test_flags_of_other_trainers_are_told_their_name_here(tmp_path: Path):
    for flag, ours in {
        "--learning_rate=1e-4": "--lr",
        "--num_train_epochs": "--epochs",
        "--resume-from-checkpoint": "--resume",
        "--gradient_accumulation_steps": "--n_iter_to_acc N splits --batch_size",
        "--checkpointing_steps": "--save_steps",
        "--checkpoints_total_limit": "--keep",
        "--logging_dir": "--tensorboard_dir",
        "--max_train_steps": "--max_steps",
        "--with_tracking": "--report_to",
        "--imgsz": "--eval_size",
        "--device": "CUDA_VISIBLE_DEVICES",
        "--workers": "--num_workers",
        "--weights": "--load_from",
    }.items():
        name = flag.partition("=")[0].replace("-", "_").removeprefix("__")
        assert re.search(rf"--{name}; .*{re.escape(ours)}\b", message([flag, "8"])), flag
        if name in ("learning_rate", "gradient_accumulation_steps"):
            (tmp_path / "theirs.yaml").write_text(f"{name}: 8\n")
            said = message(["--config", str(tmp_path / "theirs.yaml")])
            assert f"unknown setting {name}; " in said and ours in said


def test_the_names_elsewhere_are_no_settings_and_the_names_here_are():
    ours = set(settings_of(TrainConfig)) | set(settings_of(ViDTConfig))
    assert not ours & set(ELSEWHERE)
    for theirs, hint in ELSEWHERE.items():
        named = set(re.findall(r"--(\w+)", hint)) - {"num_processes"}  # of the launcher
        assert named <= ours, f"{theirs} is told {named - ours}"


def test_classes_are_left_to_the_data():
    assert parse([])[1]["num_classes"] is None
    assert parse(["--num_classes", "7"])[1]["num_classes"] == 7


def test_flag_before_file_before_recipe_before_default(tmp_path: Path):
    recipe = yaml.safe_load(
        (Path(__file__).parent.parent / "trainer/settings/recipes/shapes.yaml").read_text()
    )
    settings = both([])
    assert settings["batch_size"] == recipe["batch_size"] != TrainConfig().batch_size
    assert settings["det_token_num"] == recipe["det_token_num"] != ViDTConfig().det_token_num
    assert settings["patience"] == TrainConfig().patience

    file = tmp_path / "mine.yaml"
    file.write_text("batch_size: 6\nmin-lr: 1e-5\nlr: 2e-4\ntrain_sizes: 64\nema: 'no'\n")
    settings = both(["--lr", "3e-4", "--config", str(file)])
    assert (settings["lr"], settings["batch_size"], settings["min_lr"]) == (3e-4, 6, 1e-5)
    assert (settings["train_sizes"], settings["ema"]) == ((64,), False)
    assert settings["det_token_num"] == recipe["det_token_num"]


def test_no_recipe_and_no_path_for_callers_with_samples_of_their_own():
    config, model = parse(["--epochs", "3"], own_data=True)
    assert config == TrainConfig(epochs=3)
    assert model["det_token_num"] == ViDTConfig().det_token_num
    parse(["--dataset_file", "voc"], own_data=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batchsize: 2", ["unknown setting batchsize", "the nearest is batch_size"]),
        ("lr: quick", ["lr is 'quick'", "a number"]),
        ("lr: true", ["lr is True", "a number"]),
        ("epochs: 2.0", ["epochs is 2.0", "a whole number"]),
        ("flip: 2", ["flip is 2", "True or False"]),
        ("coco_path: 2017", ["coco_path is 2017", "text"]),
        ("epochs: null", ["epochs is None", "a whole number"]),
        ("config: other.yaml", ["unknown setting config"]),
        ("- lr", ["holds no settings"]),
        ("lr: [1", ["is not YAML"]),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, parts: list[str]):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    found = message(["--config", str(file)])
    assert [part for part in [str(file), *parts] if part not in found] == [], found


def test_an_empty_file_changes_nothing(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert both(["--config", str(tmp_path / "empty.yaml")]) == both([]) | {
        "config": str(tmp_path / "empty.yaml")
    }


@pytest.mark.parametrize(
    "argv",
    [
        [],
        FOUR_FILES,
        PREDECESSOR.split(),
        [*COCO, "--lr", "3.3e-5", "--min-lr", "1e-12", "--train_sizes", "320,352", "--no-ema"],
        ["--output_dir", "a: b # c", "--tensorboard_dir", "none ", "--cross_indices", "[]"],
    ],
)
def test_a_written_configuration_gives_the_same_run(tmp_path: Path, argv: list[str]):
    file = tmp_path / "config.yaml"
    config, model = parse(argv)
    write_yaml(file, config, model)
    again, model_again = parse(["--config", str(file)])
    assert resolved(again, model_again) == resolved(config, model)
    assert vars(again) == vars(config) | {"config": str(file)}
    assert model_again == model


def test_all_settings_are_written_but_how_this_start_was_made():
    config, model = parse(["--resume"])
    names = {item.name for owner in (TrainConfig, ViDTConfig) for item in fields(owner)}
    assert resolved(config, model).keys() == names - {"config", "resume"}


def test_no_setting_has_two_owners():
    assert not settings_of(TrainConfig).keys() & settings_of(ViDTConfig).keys()


def test_help_lists_every_flag_once_with_its_default():
    text = help_text()
    for owner in (TrainConfig, ViDTConfig):
        for item in fields(owner):
            assert len(re.findall(rf"^  --{item.name} ", text, re.MULTILINE)) == 1
    assert re.search(r"--epochs 50 +passes over", text)
    assert max(map(len, text.splitlines())) <= 110


def test_every_setting_of_a_run_has_a_description():
    assert [item.name for item in fields(TrainConfig) if not item.metadata.get("help")] == []


def test_programs_end_with_one_line_and_code_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        parse_or_exit(["--lr", "fast"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --lr is 'fast'; it must be a number\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_shown_by_programs_and_refused_by_others(
    flag: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        parse_or_exit([flag])
    assert end.value.code == 0
    assert capsys.readouterr().out == help_text()
    with pytest.raises(HelpRequested):
        parse([flag])


def test_a_fine_tuning_run_is_resumed_from_its_own_settings(tmp_path: Path):
    """Where it once started from is no concern of the rest of it."""
    path = tmp_path / "config.yaml"
    path.write_text("load_from: weights.safetensors\n")
    assert parse(["--config", str(path)])[0].load_from == "weights.safetensors"
    resumed = parse(["--config", str(path), "--resume"])[0]
    assert (resumed.load_from, resumed.resume) == (None, "auto")
