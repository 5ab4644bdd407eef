"""The benchmarks start, measure something, and write it down. Their figures are no matter here, but
those of padding, which do not depend on the machine.
"""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.shapes import write_shapes
from trainer.settings.config import TrainConfig
from vidt.ops.packing import PackedLinear, onednn_runs

ROOT = Path(__file__).parent.parent


def run(program: str, *flags: object) -> str:
    """What the program prints."""
    command = [sys.executable, f"benchmarks/{program}", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The files of benchmarks/speed.py as modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("ceiling", "contestants", "laps", "parts", "results", "speed")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.mark.slow
def test_speed_tells_everything_about_a_case(tmp_path: Path) -> None:
    printed = run("speed.py", "--quick", "--device", "cpu", "--json", tmp_path / "speed.json")
    written = json.loads((tmp_path / "speed.json").read_text())
    assert min(written["ceiling"].values()) > 0
    assert written["environment"]["OMP_NUM_THREADS"] == "1"
    (result,) = written["results"]
    rows = {row["work"]: row for row in result["rows"]}
    works = ["timm forward", "forward", "timm learning", "learning", "training step"]
    assert list(rows) == works and not result["failures"]
    for row in rows.values():
        assert 0 < row["fastest"] <= row["median"] <= row["slowest"]
        assert f"{row['median']:.4f}" in printed and f"{row['ratio']['median']:.3f}" in printed
    assert rows["timm learning"]["ratio"]["most"] == 1
    assert rows["learning"]["median"] < rows["training step"]["median"]
    for parts, work in (("forward_parts", "forward"), ("step_parts", "training step")):
        seconds, flops = (sum(part[key] for part in result[parts]) for key in ("seconds", "flops"))
        assert seconds == pytest.approx(rows[work]["median"])
        assert flops == rows[work]["flops"] > 0
        assert sum(part["share"] for part in result[parts]) == pytest.approx(1)
    peaks = result["peaks"]
    assert peaks["forward"] > peaks["empty process"] + 0.06  # the weights alone, in GiB
    # Gradients, then two averages of each: as much again, and twice as much.
    assert peaks["learning"] > peaks["forward"]
    assert peaks["training step"] > peaks["learning"] + 0.1
    assert peaks["timm learning"] < peaks["learning"]
    assert result["loader_seconds"] > 0


def test_a_part_has_what_no_part_inside_it_has(files: SimpleNamespace) -> None:
    class Counter:
        value = 0

        def read(self) -> int:
            return self.value

        def gained(self, first: int, second: int) -> float:
            return second - first

    meter = Counter()
    laps = files.laps.Laps(meter)
    with laps.part("outer"):
        meter.value += 1
        with laps.part("inner"):
            meter.value += 10
        meter.value += 100
        laps.turn_into("end of outer")
        meter.value += 1000
    meter.value += 10_000
    with laps.part("inner"):
        meter.value += 100_000
    assert laps.gains() == {
        "outer": 101,
        "inner": 100_010,
        "end of outer": 1000,
        files.laps.REST: 10_000,
    }
    assert laps.reading_after("end of outer") == 1111
    assert laps.reading_after("inner") == 111_111


def case_of(files: SimpleNamespace, body: str, **more: object) -> object:
    settings = {"size": (1, 64, 96), "plus": False, "device": "cpu", "precision": "no"}
    return files.contestants.Case(**{"backbone_name": body, "threads": 1, **settings, **more})


@pytest.mark.slow
@pytest.mark.parametrize("body", ["swin_nano", "coat_lite_tiny"])
def test_parts_are_the_whole(body: str, files: SimpleNamespace) -> None:
    detector = files.contestants.Detector(case_of(files, body))
    model, parts = detector.model, files.parts
    forward, training = (
        parts.count_flops(parts.watched(each, detector)) for each in detector.eager()
    )
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with FlopCounterMode(display=False) as counter:
        model.train()(detector.images, detector.padding, detections_only=True)
    assert sum(forward.values()) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model.backbone(detector.images, detector.padding)
    assert forward["backbone"] == training["backbone"] == counter.get_total_flops()
    assert {"projections", "decoder", "heads"} <= {part for part in forward if forward[part]}
    assert {"criterion", "matcher", "backward", "clip", "optimiser", "EMA"} <= set(training)
    # Of each product, one for the gradient of either factor. PyTorch counts those of convolutions
    # over single channels, which CoaT has, as more.
    assert 1.9 < training[parts.BACKBONE_BACKWARD] / training["backbone"] < 2.4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_predicts_with_packed_weights_as_a_predictor_does(
    precision: str, files: SimpleNamespace
) -> None:
    detector = files.contestants.Detector(case_of(files, "swin_nano", precision=precision))
    forward, training = detector.eager()
    for contestant in (forward, training, forward):
        contestant.prepare()
        expected = onednn_runs() and precision == "no" and contestant is forward
        packed = [each for each in detector.model.modules() if isinstance(each, PackedLinear)]
        assert bool(packed) == expected


@pytest.mark.parametrize("body", ["swin_nano", "coat_lite_tiny"])
def test_the_floor_has_the_sizes_of_the_body(body: str, files: SimpleNamespace) -> None:
    case = case_of(files, body)
    ours = files.contestants.Detector(case).model.backbone
    floor = files.contestants.floor_backbone(case)
    sizes = [
        sorted(each.weight.shape for name, each in part.named_modules() if name.endswith("fc1"))
        for part in (ours, floor)
    ]
    assert sizes[0] == sizes[1] and len(sizes[0]) >= 8
    assert floor.forward_features(case.images()).isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_every_round_may_have_another_size(files: SimpleNamespace) -> None:
    """The same for all contestants, ten of them, and each computes what it is given."""
    case = case_of(files, "swin_nano", new_sizes=True)
    detector, floor = files.contestants.Detector(case), files.contestants.Floor(case)
    contestants = [*floor.eager(), *detector.eager()]
    seen = []
    for _ in range(10):
        for each in contestants:
            each.prepare()
        seen.append(tuple(detector.images.shape[2:]))
        assert tuple(floor.images.shape[2:]) == seen[-1]
    assert len(set(seen)) > 3
    for each in (contestants[0], contestants[2]):
        each.seconds(torch.device("cpu"))


def test_a_ratio_is_that_of_each_round(files: SimpleNamespace) -> None:
    rounds = {
        ("timm forward", "eager"): [{"forward": 2.0}, {"forward": 4.0}, {"forward": 1.0}],
        ("timm learning", "eager"): [{"forward": 1.0, "backward": 1.0}] * 3,
        ("forward", "eager"): [{"forward": 3.0}, {"body": 3.0, "rest": 1.0}, {"forward": 2.0}],
        ("training step", "eager"): [{"forward": 2.0, "backward": 1.0, "clip": 1.0}] * 3,
    }
    flops = {"forward": {"body": 60.0, "decoder": 30.0}}
    limit = files.ceiling.Ceiling(flops=300.0, bytes=1.0)
    rows = files.results.make_rows(rounds, flops, {"learning": 0.5}, limit, num_images=6)
    by_work = {row.work: row for row in rows}
    assert by_work["forward"].ratios == [1.5, 1.0, 2.0]
    assert by_work["forward"].as_dict()["ratio"] == {"median": 1.5, "least": 1.0, "most": 2.0}
    assert by_work["forward"].images_per_second == 2
    assert by_work["forward"].of_limit == pytest.approx(0.1)
    assert by_work["learning"].seconds == [3.0] * 3 and by_work["learning"].memory_gib == 0.5
    assert by_work["training step"].ratios == [2.0] * 3


def test_parts_that_touch_parameters_are_held_against_the_memory(files: SimpleNamespace) -> None:
    limit = files.ceiling.Ceiling(flops=10.0, bytes=1000.0)
    rounds = [{"body": 3.0, "optimiser": 1.0}, {"body": 5.0, "optimiser": 1.0}]
    body, optimiser = files.results.make_parts(rounds, {"body": 8.0}, limit, num_parameters=10)
    assert (body.seconds, body.share, body.of_limit) == (4.0, 0.8, pytest.approx(0.2))
    assert optimiser.of_limit == pytest.approx(0.28)  # 3 averages and weights written, 4 read


def test_who_fails_is_left_out(files: SimpleNamespace) -> None:
    def fail(laps: object) -> None:
        raise RuntimeError("no compiler\nand more")

    good = files.laps.Contestant("forward", "eager", nn.Identity(), False, lambda laps: None)
    bad = files.laps.Contestant("forward", "compiled", nn.Identity(), False, fail)
    failures: list[str] = []
    assert files.speed.able([bad, good], torch.device("cpu"), failures) == [good]
    assert failures == ["forward, compiled: failed, no compiler"]


@pytest.mark.slow
def test_data_measures_each_number_of_workers(tmp_path: Path) -> None:
    written = tmp_path / "data.json"
    folder = write_shapes(tmp_path, num_train=6, num_val=2, size=64)
    flags = ("--dataset_file", "coco", "--coco_path", folder, "--eval_size", 64)
    run("data.py", *flags, "--workers", 0, 1, "--count", 8, "--json", written)
    (result,) = json.loads(written.read_text())["results"]
    assert [rate["workers"] for rate in result["workers"]] == [0, 1]
    assert all(rate["images_per_second"] > 0 for rate in result["workers"])


@pytest.mark.slow
def test_data_compares_with_bare_decoding(tmp_path: Path) -> None:
    written = tmp_path / "data.json"
    folder = write_shapes(tmp_path, num_train=6, num_val=2, size=64) / "train2017"
    flags = ("--images", folder, "--eval_size", 64, "--workers", "--count", 8, "--json", written)
    printed = run("data.py", *flags)
    (result,) = json.loads(written.read_text())["results"]
    assert result["data"] == str(folder) and result["workers"] == []
    assert min(result["bare"], result["loader"], result["ratio"]) > 0
    assert f"ratio {result['ratio']:.2f}" in printed


@pytest.mark.slow
def test_loader_compares_with_a_cache(tmp_path: Path) -> None:
    written = tmp_path / "loader.json"
    flags = ("--sizes", "640x480", "--eval_size", 64, "--rounds", 1, "--json", written)
    printed = run("loader.py", *flags)
    (rate,) = json.loads(written.read_text())
    assert min(rate["plain"], rate["filling"], rate["cached"]) > 0
    assert rate["cached_mb"] == pytest.approx(3 * 86 * 114 / 1e6, rel=0.05)  # 4/3 of 64 x 85
    assert rate["size"] in printed


@pytest.mark.slow
def test_scoring_compares_with_pycocotools(tmp_path: Path) -> None:
    written = tmp_path / "scoring.json"
    flags = ("--images", 12, "--detections", 30, "--classes", 3, "--json", written)
    printed = run("scoring.py", *flags)
    result = json.loads(written.read_text())
    assert result["equal"] and result["detections"] == 360
    assert min(result["pycocotools"], result["ours"]) > 0
    assert f"ratio {result['ratio']:.1f}" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "640x640"], "'640x640'; it must be like 2x640x480"),
        (["--device", "cpu", "--precision", "fp16"], "is for a GPU"),
        (["--device", "tpu"], "'tpu'; it must be cpu or cuda"),
        (["--repeat", "0"], "must be 1 or more"),
    ],
)
def test_wrong_flags_are_named(
    flags: list[str], message: str, files: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        files.speed.arguments(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_functions_counts_what_runs(tmp_path: Path) -> None:
    run("functions.py", "--json", tmp_path / "counts.json")
    job, forward, whole = json.loads((tmp_path / "counts.json").read_text()).values()
    assert "trainer/train.py" in job["longest_files"]
    assert "vidt/model/vidt.py" in forward["longest_files"]
    assert not [name for name in forward["longest_files"] if name.startswith("trainer")]
    for counts in (job, forward):
        assert 0 < counts["functions"] < counts["code_lines"] < counts["file_lines"]
        assert sum(counts["code_lines_by_room"].values()) == counts["code_lines"]
        assert counts["code_lines"] < whole["lines"]


@pytest.mark.slow
def test_overlap_tells_all_modes(tmp_path: Path) -> None:
    """Without namespaces and without a slowed link, which need root."""
    small = ("--side", 64, "--images", 1, "--rounds", 1)
    printed = run("overlap.py", "--rate", "none", *small, "--json", tmp_path / "overlap.json")
    written = json.loads((tmp_path / "overlap.json").read_text())
    assert all(written[mode] > 0 for mode in ("compute", "transfer", "after", "overlap", "ddp"))
    assert "of max(compute, transfer)" in printed


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_toy_sizes(tmp_path: Path) -> None:
    sections = ("agreement", "step_times", "kernels", "attention", "deformable")
    written = tmp_path / "gpu.json"
    run("gpu.py", "--device", "cpu", "--quick", "--only", *sections, "--json", written)
    results = json.loads(written.read_text())
    assert list(results) == ["machine", *sections]
    exact = results["agreement"]["no highest"]
    assert exact["loss"] == pytest.approx(1) and exact["worst"] < 1e-5
    assert results["agreement"]["bf16 highest"]["median"] < 0.2
    assert min(each["seconds"] for each in results["step_times"].values()) > 0
    assert results["kernels"]["kernels"] > 100
    assert results["attention"]["[DET] 40"]["finite"]


def test_padding_is_as_little_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin over the figures of docs/benchmarks.md; the released way pads most."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    padding = importlib.import_module("padding")
    samples = padding.table_of(padding.coco_sizes(1500))
    most = {(1, 2): 1.08, (2, 2): 1.10, (1, 16): 1.15}
    for (processes, batch), limit in most.items():
        config = TrainConfig(batch_size=batch)
        assert 1 < padding.padded_over_own(config, samples, processes) < limit
    released = TrainConfig(batch_size=16, scale_per="image", group_by_aspect=False)
    assert padding.padded_over_own(released, samples, 1) > 1.8
    assert padding.padded_over_own(replace(released, batch_size=2), samples, 8) > 1.8


def test_sizes_are_those_of_coco(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    padding = importlib.import_module("padding")
    assert sum(padding.COMMON.values()) + sum(padding.OTHERS) == 5000
    assert len(padding.BOUNDS) == len(padding.OTHERS) + 1
    sizes = padding.coco_sizes(5000)
    assert padding.coco_sizes(5000) == sizes and max(map(max, sizes)) == 640
    counts = Counter(sizes)
    assert counts[480, 640] == pytest.approx(1061, rel=0.1)
    assert counts[640, 480] == pytest.approx(336, rel=0.2)
    landscape = sum(width > height for height, width in sizes)
    assert landscape == pytest.approx(3602, rel=0.03)
