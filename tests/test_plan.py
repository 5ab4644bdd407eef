"""`--preset auto` and `--hours`: a dataset's plan, what wins over it, how long a run becomes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_runs import Picture, random_pictures, write_coco

from trainer.commands.command_line import main as vidt
from trainer.data.dataset_statistics import crowding, fingerprint_of
from trainer.data.load import read_datasets, read_parts
from trainer.loop.start import settled
from trainer.loop.time_limit import EVALUATING, RESERVE, fitting_length
from trainer.settings.parsing import given_settings, in_words, parse
from trainer.settings.plan import Fingerprint, planned, planned_sizes, repeated
from trainer.train import main
from vidt.errors import UserError
from vidt.images.preprocessing import Preprocessing
from vidt.model.config import ViDTConfig
from vidt.model.vidt import ViDT
from vidt.weights.weights_file import WeightsInfo, save_weights

SMALL = Fingerprint(
    images=200,
    classes=3,
    boxes=2800,
    busiest=28,
    short_side=480,
    aspect=1.33,
    small_object=0.17,
    rarest=0.6,
    crowding=0.01,
    gpu=False,
    threads=2,
    processes=1,
    pretrained=False,
)
# The training images of COCO 2017.
COCO = replace(
    SMALL, images=117_266, classes=80, boxes=849_949, busiest=93, rarest=0.0016, gpu=True,
    pretrained=True, small_object=0.03,
)  # fmt: skip


# What `fingerprint_of` returns for the data of docs/recipes.md, and the hours of their plans.
RACCOONS = replace(
    SMALL, images=160, classes=1, boxes=174, busiest=3, short_side=270, aspect=1.39076,
    small_object=0.48167, rarest=1.0, crowding=0.0, hours=0.0833,
)  # fmt: skip
CELLS = replace(
    SMALL, images=205, boxes=2804, aspect=4 / 3, small_object=0.16849, rarest=0.57073,
    crowding=0.00678, hours=0.1333,
)  # fmt: skip
SHAPES = replace(
    SMALL, images=400, boxes=1373, busiest=6, short_side=128, aspect=1.0, small_object=0.16425,
    rarest=0.67, crowding=0.0, hours=155 / 3600,
)  # fmt: skip


def plan_for(data: Fingerprint, flags: str = "") -> tuple[dict, str]:
    words = ["--preset", "auto", *flags.split()]
    config, model = parse(words, own_data=True)
    config, model, told = planned(config, model, given_settings(words), data)
    return {**vars(config), **model}, told


def test_a_large_dataset_keeps_the_released_recipe() -> None:
    settings, told = plan_for(COCO)
    config, model = parse([], own_data=True)
    assert {**settings, "preset": "released"} == {**vars(config), **model}
    assert "released recipe" in told


def test_the_page_has_the_plans_word_for_word() -> None:
    page = Path(__file__).parent.parent.joinpath("docs/recipes.md").read_text(encoding="utf-8")
    _, of_raccoons = plan_for(RACCOONS, "--pre_trained none")
    assert of_raccoons in page
    for data in (CELLS, SHAPES):
        lines = plan_for(data, "--pre_trained none")[1].splitlines()
        assert "\n".join(line for line in lines if line not in of_raccoons.splitlines()) in page
    assert plan_for(COCO)[1] in page


def test_every_choice_has_a_reason_and_is_taken() -> None:
    settings, told = plan_for(SMALL)
    lines = told.splitlines()[1:]
    names = [line.split()[0] for line in lines]
    assert len({*names}) == len(names) > 15
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"  {name} {in_words(name, settings[name])}: ")


def test_what_is_given_wins() -> None:
    settings, told = plan_for(SMALL, "--eval_size 512 --backbone_name swin_tiny --lr 1e-3")
    assert settings["eval_size"] == 512 and settings["backbone_name"] == "swin_tiny"
    assert settings["lr"] == 1e-3
    assert "eval_size 512: as given" in told


def test_choices_follow_what_is_given() -> None:
    settings, _ = plan_for(SMALL, "--eval_size 512 --epochs 20 --warmup_steps 70")
    assert settings["train_sizes"] == (480, 496, 512, 528, 544)
    assert settings["eval_interval"] == settings["save_interval"] == 1
    assert plan_for(SMALL, "--epochs 100")[0]["eval_interval"] == 5
    assert settings["warmup_share"] == 0
    assert plan_for(SMALL, "--n_iter_to_acc 4")[0]["batch_size"] == 8
    assert plan_for(SMALL, "--batch_size 32")[0]["epochs"] == 300
    with pytest.raises(UserError, match="n_iter_to_acc"):
        plan_for(SMALL, "--n_iter_to_acc 3 --batch_size 4")
    for flags in ("--method vidt_wo_neck", "--dec_layers 0", "--no-with_box_refine"):
        settings, _ = plan_for(SMALL, flags)
        assert not settings["denoising"]


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"busiest": 4}, "det_token_num", 20),
        ({"busiest": 100}, "det_token_num", 150),
        ({"busiest": 5000}, "det_token_num", 900),
        ({"pretrained": True}, "backbone_name", "swin_nano"),
        ({"pretrained": True, "gpu": True}, "backbone_name", "swin_tiny"),
        ({"small_object": 0.01}, "eval_size", 480),
        ({"small_object": 0.5}, "eval_size", 224),
        ({"rarest": 0.01}, "repeat_thresh", 0.05),
    ],
)
def test_rules(changes: dict, name: str, value: object) -> None:
    assert plan_for(replace(SMALL, **changes))[0][name] == value


def test_less_time_means_smaller_images() -> None:
    sides = [
        plan_for(replace(SMALL, small_object=0.02, short_side=640, hours=hours))[0]["eval_size"]
        for hours in (0.02, 0.2, 2.0)
    ]
    assert sides == sorted(sides) and sides[0] < sides[-1]


def test_any_dataset_gets_a_plan_that_can_be_used() -> None:
    for images in (1, 30, 19_999):
        for busiest in (1, 10_000):
            for small in (1e-6, 1.0, 3.0):
                for hours in (None, 1e-3, 100.0):
                    plan_for(
                        replace(
                            SMALL, images=images, busiest=busiest, small_object=small, hours=hours
                        )
                    )


def test_without_the_preset_nothing_changes() -> None:
    """The predecessor's command line gives what it gave, also beside the embedded recipe."""
    assert parse([])[0].eval_size == 112 and parse([])[0].preset == "released"
    assert parse(["--preset", "released"])[0] == parse([])[0]
    assert parse(["--preset", "auto"])[0].eval_size == 640  # until the data is known
    assert parse(["--coco_path", "data"])[0].preset == "released"
    assert parse(["--data", "data"])[0].preset == "auto"
    assert parse(["--data", "data", "--preset", "released"])[0].preset == "released"
    assert parse(["--data", "data", "--eval"])[0].preset == "released"
    with pytest.raises(UserError, match="preset"):
        parse(["--preset", "best"])


def test_the_fingerprint_of_a_dataset(tmp_path: Path) -> None:
    write_coco(tmp_path, random_pictures(6, seed=0), random_pictures(2, seed=1))
    config, _ = parse(["--coco_path", str(tmp_path)])
    train, _, _ = read_datasets(config, num_queries=100, num_classes=None)
    data = fingerprint_of(train, gpu=False, threads=1, processes=1, pretrained=False)
    assert data.images == 6 and data.boxes == len(train.labels)
    assert data.busiest == int(train.box_counts.max())
    assert data.short_side == 56  # of sides of 48 and 64, three each
    assert 0 < data.small_object < 2 and 0 < data.rarest <= 1


def test_crowding(tmp_path: Path) -> None:
    (picture,) = random_pictures(1, seed=0)
    box = (10, 10, 20, 20, 0, 0)
    crowded = picture.__class__(64, 64, (box, (10, 10, 20, 18, 0, 0), (40, 40, 10, 10, 0, 0)))
    write_coco(tmp_path, [crowded], [picture])
    config, _ = parse(["--coco_path", str(tmp_path)])
    train, _, _ = read_datasets(config, num_queries=100, num_classes=None)
    assert crowding(train) == pytest.approx(2 / 3)


def test_saved_settings_are_repeated() -> None:
    saved = {"eval_size": 224, "lr": "3e-4", "reduced_dim": 128, "hours": 0.5, "max_steps": 90,
             "mixed_precision": "no", "of_an_older_version": 1}  # fmt: skip
    words = ["--preset", "auto", "--lr", "1e-3"]
    config, model = repeated(*parse(words, own_data=True), given_settings(words), saved)
    assert config.eval_size == 224 and config.lr == 1e-3 and model["reduced_dim"] == 128
    assert (config.hours, config.max_steps) == (0.5, 90) and config.mixed_precision == "auto"
    words += ["--epochs", "40"]  # the length that --hours stood for no longer counts
    config, _ = repeated(*parse(words, own_data=True), given_settings(words), saved)
    assert (config.epochs, config.hours, config.max_steps) == (40, None, None)
    words += ["--hours", "0.5"]  # also if the whole command is repeated
    config, _ = repeated(*parse(words, own_data=True), given_settings(words), saved)
    assert (config.epochs, config.hours, config.max_steps) == (40, None, None)


def test_a_given_length_replaces_what_a_trial_found(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text("hours: 0.1\nepochs: 7\nmax_steps: 90\n", encoding="utf-8")
    assert given_settings(["--config", str(saved)])["max_steps"] == 90
    assert given_settings(["--config", str(saved)])["hours"] == 0.1
    for flag, value in (("hours", 2), ("epochs", 40), ("max_steps", 300)):
        given = given_settings(["--config", str(saved), f"--{flag}", str(value)])
        assert {"config": str(saved), "epochs": 7} | {flag: value} == given


def test_what_the_run_to_resume_saved(tmp_path: Path) -> None:
    """The newest checkpoint says it, by whatever folder the run is named."""
    config, model = parse(["--preset", "auto", "--resume", str(tmp_path / "run")], own_data=True)
    assert settled(config, model, frozenset())[1:] == (model, frozenset())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("lr: 0.01\n")  # of a start without a checkpoint
    assert settled(config, model, frozenset())[0].lr == config.lr
    for step, rate in ((5, 0.02), (10, 0.03)):
        checkpoint = tmp_path / f"run/checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        settings = {"lr": rate, "det_token_num": 30}
        (checkpoint / "state.json").write_text(json.dumps({"state": {"settings": settings}}))
    for folder in ("run", "run/checkpoints", "run/checkpoints/step-00000010"):
        named = replace(config, resume=str(tmp_path / folder))
        kept, fields, fixed = settled(named, model, frozenset())
        assert kept.lr == 0.03 and fields["det_token_num"] == 30 and "lr" in fixed
    checkpoint.joinpath("state.json").write_text("torn")
    assert settled(config, model, frozenset())[0].lr == 0.02


def test_heads_for_training_are_not_taken_from_the_start(
    tmp_path: Path, tiny_config: ViDTConfig
) -> None:
    """A detector with a mask head is a start for data without masks too."""
    with_heads = replace(tiny_config, with_vector=True, token_label=True)
    info = WeightsInfo(with_heads, ("a", "b", "c"), Preprocessing())
    save_weights(tmp_path / "masks.safetensors", ViDT(with_heads).state_dict(), info)
    words = ["--preset", "auto", "--load_from", str(tmp_path / "masks.safetensors")]
    config, model = parse(words, own_data=True)
    _, fields, fixed = settled(config, model, given_settings(words))
    assert fields["det_token_num"] == 7 and {"det_token_num", "backbone_name"} <= fixed
    assert not fields["with_vector"] and not fields["token_label"] and "with_vector" not in fixed


def test_what_else_is_given_fixes_what_it_needs(tmp_path: Path) -> None:
    for flag, fixed in (
        ("--distil_model vidt_base", {"det_token_num", "dec_layers", "reduced_dim"}),
        (f"--pre_trained {tmp_path}/swin_nano.pth", {"backbone_name"}),
    ):
        config, model = parse(["--preset", "auto", *flag.split()], own_data=True)
        assert fixed <= settled(config, model, frozenset())[2]


def test_sizes_of_the_plan() -> None:
    """They need no start, so that --freeze does not stand in the way of the check."""
    words = ["--preset", "auto", "--freeze", "1"]
    config, model = parse(words, own_data=True)
    settings, _ = plan_for(SMALL)
    sizes = settings["det_token_num"], settings["eval_size"]
    assert planned_sizes(config, model, given_settings(words), SMALL) == sizes
    words += ["--eval_size", "320"]
    given = given_settings(words)
    assert planned_sizes(*parse(words, own_data=True), given, SMALL) == (sizes[0], 320)
    assert planned_sizes(config, model, {}, COCO) == (model["det_token_num"], config.eval_size)


def test_a_plan_that_is_repeated_still_has_its_reasons() -> None:
    settings, told = plan_for(SMALL)
    config, model = parse(["--preset", "auto"], own_data=True)
    config = replace(config, **{name: settings[name] for name in vars(config)})
    model = {name: settings[name] for name in model}
    assert planned(config, model, settings, SMALL) == (config, model, told)


def test_the_number_of_epochs_needs_the_batch_size() -> None:
    with pytest.raises(UserError, match="give --epochs or --hours"):
        plan_for(SMALL, "--batch_size auto")
    assert plan_for(SMALL, "--batch_size auto --epochs 5")[0]["epochs"] == 5


def test_findings_by_the_sizes_of_the_plan(tmp_path: Path) -> None:
    many = Picture(64, 64, tuple((4 * n, 4 * n, 20, 20, 0, 0) for n in range(8)))
    write_coco(tmp_path, random_pictures(2, seed=0), [many])
    config, _ = parse(["--coco_path", str(tmp_path)])
    data = read_parts(config, num_queries=None, num_classes=None, sizes_of=lambda train: (7, 4))
    kinds = {finding.kind for finding in data.findings}
    assert {"more boxes than [DET] tokens", "object too small to be found"} <= kinds


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path, random_pictures(6, seed=0), random_pictures(2, seed=1))
    words = ["plan", str(tmp_path), "--hours", "0.1", "--eval_size", "96", "--pre_trained", "none"]
    assert vidt(words) == 0
    assert "6 images" in capsys.readouterr().out
    assert vidt([*words, "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["eval_size"] == 96 and settings["class_loss"] == "matchability"
    assert vidt(["plan", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("seconds", [30.0, 155.0, 3600.0])
@pytest.mark.parametrize("step", [0.05, 1.0])
def test_a_run_fits_into_its_time(seconds: float, step: float) -> None:
    length = fitting_length(seconds, step, per_epoch=20, step_images=5, val_images=50)
    evaluations = -(-length.epochs // length.eval_interval)
    evaluation = 50 * step / 5 / 3
    took = length.max_steps * step + evaluations * evaluation
    assert took <= seconds * (1 - RESERVE) + 1e-6
    assert took > 0.8 * seconds or seconds < 60
    assert evaluations == 1 or evaluations * evaluation <= EVALUATING * seconds
    assert length.max_steps <= length.epochs * 20


@pytest.mark.parametrize("interval", [1, 2, 30])
def test_evaluations_at_an_interval_that_is_given_are_counted(interval: int) -> None:
    length = fitting_length(
        600.0, 0.1, per_epoch=10, step_images=5, val_images=500, eval_interval=interval
    )
    evaluations = -(-length.epochs // interval)
    took = length.max_steps * 0.1 + evaluations * 500 * 0.1 / 5 / 3
    assert length.eval_interval == interval and took <= 600 * (1 - RESERVE) + 1e-6
    assert took > 0.8 * 600


def test_a_run_that_is_shorter_than_its_time() -> None:
    length = fitting_length(3600.0, 1.0, 10, step_images=5, val_images=5, max_steps=100)
    assert (length.max_steps, length.epochs) == (100, 10) and length.eval_interval <= 5


def test_time_for_the_test_part() -> None:
    sizes = {"per_epoch": 20, "step_images": 5, "val_images": 50}
    without = fitting_length(155.0, 0.1, **sizes)
    with_test = fitting_length(155.0, 0.1, **sizes, test_images=3000)
    assert (without.max_steps - with_test.max_steps) * 0.1 == pytest.approx(20, abs=1)


def test_too_little_time() -> None:
    with pytest.raises(UserError, match="hours"):
        fitting_length(1.0, 2.0, per_epoch=20, step_images=5, val_images=50)


@pytest.mark.slow
def test_a_whole_run_by_hours_and_its_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan, the length found by the trial, and a second start that keeps both."""
    monkeypatch.setattr("trainer.loop.time_limit._counted_from", time.time())
    data = write_coco(tmp_path / "data", random_pictures(6, seed=0), random_pictures(2, seed=1))
    small = "--preset auto --pre_trained none --det_token_num 5 --backbone_name swin_smallest "
    small += "--reduced_dim 64 --pos_dim 8 --dec_layers 1 --eval_size 64 --train_sizes 64 "
    small += f"--coco_path {data} --output_dir {tmp_path / 'run'} --hours 0.005"
    main(small.split())
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["class_loss"] == "matchability" and saved["det_token_num"] == 5
    assert saved["max_steps"] >= 1 and saved["preset"] == "auto"
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    main([*small.split(), "--resume", "--lr", "1e-3"])
    again = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert again == {**saved, "lr": 1e-3}
    assert (tmp_path / "run/metrics.csv").read_text().splitlines() == rows
    assert "class_loss matchability" in (tmp_path / "run/report.html").read_text()
