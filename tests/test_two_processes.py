"""Two processes compute what one computes, and decide alike whatever their data.

They are started once, by hand instead of by a launcher, so that each has an exit code of its own;
what they saw in two_processes.py is then looked at test by test.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from served import served
from tiny_plus import PLUS, save_teacher, with_masks
from tiny_runs import (
    ROOT,
    Learnt,
    Picture,
    argv,
    call,
    cpu,
    differences,
    environment,
    furthest,
    newest_checkpoint,
    numbers_of,
    program,
    published,
    random_pictures,
    settings,
    tables,
    write_coco,
)
from two_processes import BUCKET_BYTES, FROZEN, LOSSES, VALIDATION, step_gradients, training

from trainer.backward.freezing import stage_of
from trainer.loop.agreement import Agreement
from trainer.scoring.evaluation import evaluate
from vidt.weights.checkpoint import load_model

pytestmark = pytest.mark.slow
ROUNDING = 2e-5
TIMEOUT = 240.0  # seconds for all scenes on a busy machine; a hang would last for hours


@dataclass(frozen=True)
class Ended:
    """What the two processes saw, and how they ended."""

    folder: Path
    seen: list[dict[str, Any]]
    codes: list[int]
    said: list[str]
    seconds_of_last_scene: float


def write_scenes(folder: Path, learnt: Learnt) -> None:
    write_coco(folder / "data", random_pictures(12, 0), random_pictures(3, 1))
    # One picture of four has boxes: whichever process gets it, the other has none.
    bare = [Picture(64, 64, ()), *random_pictures(1, 0), Picture(48, 80, ()), Picture(64, 64, ())]
    write_coco(folder / "no-masks", bare, bare[:1])
    with_masks(folder / "no-masks", folder / "bare")
    _, plus = settings(folder / "bare", folder, PLUS)
    save_teacher(folder / "plus", plus)
    for count in VALIDATION:
        pictures = random_pictures(count, 0)
        write_coco(folder / f"val{count}", pictures, pictures)
    write_coco(folder / "bad", random_pictures(4, 0), random_pictures(2, 1))
    (folder / "bad/train2017/101.png").unlink()
    (folder / "learnt.safetensors").symlink_to(learnt.weights)


@pytest.fixture(scope="module")
def ended(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("two")
    write_scenes(folder, learnt)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, str(ROOT / "tests/two_processes.py"), str(folder)]
    ours = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            words,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **ours),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        said = [p.communicate(timeout=max(deadline - time.monotonic(), 1))[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    begins = [folder / f"begin{rank}" for rank in range(2)]
    assert all(path.exists() for path in begins), "\n".join(said)
    seconds = time.time() - min(path.stat().st_mtime for path in begins)
    seen = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return Ended(folder, seen, [process.returncode for process in processes], said, seconds)


@pytest.mark.parametrize("losses", LOSSES)
def test_gradients_are_those_of_one_process(ended: Ended, tmp_path: Path, losses: str) -> None:
    """Two processes with four images each, in one or two micro-batches; one process with 8."""
    first, second = (seen[f"gradients {losses}"] for seen in ended.seen)
    flags = f"--batch_size 8 {LOSSES[losses]}"
    for ours, theirs, alone in zip(
        first, second, step_gradients(ended.folder / "data", tmp_path, flags), strict=True
    ):
        assert differences(ours, theirs) == []
        share, name = furthest(ours, alone)
        assert share < ROUNDING, f"{name} differs by {share:.1e}"


def test_gradients_with_a_teacher_are_those_of_one_process(ended: Ended, tmp_path: Path) -> None:
    flags = f"--batch_size 8 --distil_model_path {ended.folder}/learnt.safetensors"
    alone = step_gradients(ended.folder / "data", tmp_path, flags)
    for seen in ended.seen:
        for ours, theirs in zip(seen["gradients with a teacher"], alone, strict=True):
            assert furthest(ours, theirs)[0] < ROUNDING


def test_gradients_where_one_process_has_no_boxes(ended: Ended, tmp_path: Path) -> None:
    alone = step_gradients(ended.folder / "bare", tmp_path, "--batch_size 4")
    for seen in ended.seen:
        for ours, theirs in zip(seen["gradients without boxes"], alone, strict=True):
            assert furthest(ours, theirs)[0] < ROUNDING


def test_gradients_of_all_parts_where_one_process_has_no_boxes(
    ended: Ended, tmp_path: Path
) -> None:
    """ViDT+ with a teacher, in micro-batches; every parameter has a gradient on both processes."""
    flags = f"--batch_size 4 {PLUS} --distil_model_path {ended.folder}/plus"
    alone = step_gradients(ended.folder / "bare", tmp_path, flags)
    for seen in ended.seen:
        found = seen["gradients of all parts without boxes"]
        for ours, theirs in zip(found, alone, strict=True):
            assert furthest(ours, theirs)[0] < ROUNDING


def test_every_image_is_scored_once(ended: Ended, learnt: Learnt) -> None:
    """One image for two processes, an odd number, an even one; batches of 1, 2 and 5."""
    model, info = load_model(learnt.weights)
    for count in VALIDATION:
        config, fields = settings(ended.folder / f"val{count}", ended.folder)
        alone = numbers_of(
            evaluate(
                model,
                tables(config, fields)[1],
                info.preprocessing,
                cpu(),
                Agreement(cpu()),
                batch_size=2,
                num_workers=0,
            )
        )
        assert 0 < alone["map"] < 1
        for seen in ended.seen:
            for metrics in seen["evaluations"][count]:
                assert metrics == pytest.approx(alone, abs=1e-6)


def test_training_reports_what_one_process_reports(ended: Ended, tmp_path: Path) -> None:
    first, second = (seen["training"] for seen in ended.seen)
    flags = "--batch_size 4 --dropout 0 --max_steps 3"
    alone = training(ended.folder / "data", tmp_path, flags)
    assert first[-1] == second[-1]
    assert {*second} == {-1}, "only the main process reports"
    for step in (1, 2, 3):
        names = [name for name in alone[step] if name.startswith(("loss", "grad_norm"))]
        expected = {name: alone[step][name] for name in names}
        found = {name: first[step][name] for name in names}
        assert found == pytest.approx(expected, rel=1e-2 if step > 1 else 1e-4)


def test_training_where_most_images_have_no_boxes(ended: Ended) -> None:
    """One image of two a step: in most steps one process, or both, have none."""
    for seen in ended.seen:
        assert "map50" in seen["bare training"][-1]
    assert {*ended.seen[0]["bare training"]} == {-1, 1, 2, 3}


def test_frozen_stages_and_repeated_images_train_as_on_one_process(
    ended: Ended, tmp_path: Path
) -> None:
    """The frozen weights are those of the start, bit for bit."""
    first, second = (seen["frozen"] for seen in ended.seen)
    flags = FROZEN.replace("--batch_size 2", "--batch_size 4")
    weights = ended.folder / "learnt.safetensors"
    alone = training(ended.folder / "data", tmp_path, f"{flags} {weights}")
    assert first[-1] == second[-1]
    for step in (1, 2, 3):
        names = [name for name in alone[step] if name.startswith(("loss", "grad_norm"))]
        expected = {name: alone[step][name] for name in names}
        found = {name: first[step][name] for name in names}
        assert found == pytest.approx(expected, rel=1e-2 if step > 1 else 1e-4)
    before, after = load_file(weights), load_file(ended.folder / "results/frozen/last.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (stage_of(name) in (0, 1, 2)), name


def test_memory_that_runs_out_on_one_process_makes_both_take_less(ended: Ended) -> None:
    assert [seen["out of memory"] for seen in ended.seen] == [[], []]
    assert (ended.folder / "results/memory/short/best.safetensors").exists()


def test_memory_that_runs_out_once_on_one_process_changes_nothing(ended: Ended) -> None:
    """In the middle of its backward pass: it takes part in the sums that the other waits for."""
    assert [seen["out of memory once"] for seen in ended.seen] == [[], []]
    assert (ended.folder / "results/memory/once/best.safetensors").exists()


def test_both_try_the_largest_step_and_take_what_fits_on_each(ended: Ended) -> None:
    for seen in ended.seen:
        assert seen["probe"][:4] == [4, 2, 2, 2], "four, then two; then a step of two and two"


@pytest.mark.parametrize("bucket_bytes", BUCKET_BYTES)
def test_gradients_are_summed_whoever_has_them(ended: Ended, bucket_bytes: int) -> None:
    """Also of a layer that one process does not use; one that no process uses has no gradient."""
    first, second = (seen["gradient sums"][bucket_bytes] for seen in ended.seen)
    for number, (ours, theirs) in enumerate(zip(first["own"], second["own"], strict=True)):
        for seen in (first, second):
            assert torch.equal(seen["summed"][number], ours + theirs)
    assert [len(gradient) for gradient in second["summed"]] == [1, 1, 3, 3, 3, 3, 3, 3]
    assert first["events"].count("sum") == second["events"].count("sum")


def test_sums_start_while_the_backward_pass_computes(ended: Ended) -> None:
    """Those of the last layer, weights and bias, before it reaches the one before."""
    for seen in ended.seen:
        assert seen["gradient sums"][1]["events"][:3] == ["sum", "sum", "reached"]


def test_unreadable_images_of_all_processes_count_together(ended: Ended) -> None:
    """Seven of twelve, of which neither process alone meets more than five."""
    first, second = (seen["unreadable"] for seen in ended.seen)
    assert first == second
    borne, refused = first
    assert "7 images can no longer be read" in borne and "102.png" in borne
    assert "7 of 12 training images" in refused and "--max_bad_fraction 0.5" in refused
    assert "102.png" in refused and "\n" not in refused


def test_a_signal_to_one_process_stops_both(ended: Ended) -> None:
    assert [seen["stopped"] for seen in ended.seen] == ["stopped by SIGTERM"] * 2
    path, passed_over = newest_checkpoint(ended.folder / "results/stopped")
    assert path is not None and path.name == "step-00000002" and passed_over == []


def test_a_bad_dataset_is_told_to_both(ended: Ended) -> None:
    first, second = (seen["bad dataset"] for seen in ended.seen)
    assert first == second
    assert "101.png" in first and "--max_bad_fraction" in first and "\n" not in first


def test_a_loss_that_is_not_finite_on_one_process_ends_both(ended: Ended) -> None:
    assert ended.codes == [3, 3]
    assert ended.seconds_of_last_scene < 60
    output = ended.folder / "results/non-finite"
    for said in ended.said:
        line = said.splitlines()[-1]
        assert line.startswith(
            "error: the loss is not finite at step 2: loss_ce nan, grad_norm nan; images ["
        )
    _, finding = json.loads((output / "non_finite.json").read_text())
    assert finding["step"] == 2 and str(finding["image_ids"]) in line
    path, _ = newest_checkpoint(output)
    assert path is not None and path.name == "step-00000002"


def test_a_package_named_datasets_does_no_harm(tmp_path: Path) -> None:
    """The script's folder, trainer/, comes first on the import path, and accelerate imports Hugging
    Face's `datasets` where it is installed and there are two processes.
    """
    write_coco(tmp_path / "data", random_pictures(4, 0), random_pictures(2, 1))
    package, info = tmp_path / "site/datasets", tmp_path / "site/datasets-9.9.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    imported = tmp_path / "imported"
    (package / "__init__.py").write_text(
        f"__version__ = '9.9'\nopen({str(imported)!r}, 'a').write('x')\n"
        "class IterableDataset: pass\nclass Dataset: pass\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 9.9\n")
    words = [program("torchrun"), "--nproc_per_node", "2", str(ROOT / "trainer/train.py")]
    flags = "--max_steps 1 --batch_size 1"
    done = call(
        [*words, *published(tmp_path / "data", tmp_path / "run", flags)],
        PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]),
    )
    assert done.returncode == 0, done.stderr
    assert imported.read_text() == "xx", "both processes import the package"
    assert (tmp_path / "run/best.safetensors").exists()


def test_torchrun_evaluates_as_one_process_does(learnt: Learnt, tmp_path: Path) -> None:
    """The command line, of weights that do find something, from an address: one process fetches
    them, the other waits.
    """
    content = learnt.weights.read_bytes()
    words = [program("torchrun"), "--nproc_per_node", "2", str(ROOT / "tests/tiny_runs.py")]
    with served(content) as server:
        address = f"{server.address}#sha256={hashlib.sha256(content).hexdigest()}"
        flags = f"--eval --load_from {address} --allow_http --batch_size 3"
        done = call([*words, *argv(learnt.data, tmp_path, flags)], TORCH_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert server.requests == ["/weights.pth"]
    metrics = json.loads((tmp_path / "evaluation.json").read_text())
    assert metrics == pytest.approx(load_model(learnt.weights)[1].metrics, abs=1e-6)
