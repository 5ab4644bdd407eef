"""Tiny runs of the trainer, cheap enough for every test: pictures, settings, ways to start a run.

Everything here is deterministic and computes on the CPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import trainer.train
from trainer.augmentation.denoising import Denoising
from trainer.augmentation.recipe import Augmentation
from trainer.backward.gradient_sum import GradientSum
from trainer.backward.gradients import gradients
from trainer.data.load import read_datasets
from trainer.data.loader import DetectionDataset, micro_batches
from trainer.loop import resume
from trainer.loop.agreement import Agreement
from trainer.loop.start import load_teacher
from trainer.loop.step import agree_on
from trainer.readers.samples import SampleTable
from trainer.report.progress import Progress
from trainer.scoring.evaluation import Evaluation
from trainer.settings.config import TrainConfig
from trainer.settings.parsing import parse
from trainer.train import train
from vidt.images.preprocessing import Preprocessing
from vidt.losses.criterion import criterion_for
from vidt.model.config import SWIN_VARIANTS, SwinVariant
from vidt.model.vidt import ViDTConfig, build_detector

ROOT = Path(__file__).parent.parent
Model = TypeVar("Model", bound=nn.Module)
NAMES = ("red", "green", "blue")
COLOURS = ((220, 30, 30), (30, 200, 30), (40, 40, 230))
# Four shapes, so that batches need padding and evaluation meets several canvases.
SIZES = ((64, 64), (48, 80), (80, 48), (64, 96))
# A ninth of the smallest published backbone, without and with drop path. Only processes that import
# this file know them.
SWIN_VARIANTS["swin_test"] = SwinVariant(24, (1, 1, 1, 1), (1, 2, 4, 8), 0.0)
SWIN_VARIANTS["swin_test_drop"] = SwinVariant(24, (1, 1, 1, 1), (1, 2, 4, 8), 0.2)
# The backbone of tests/data/, as small as the trainer accepts: those files stay in the repository.
SWIN_VARIANTS["swin_smallest"] = SwinVariant(2, (1, 1, 1, 1), (1, 1, 1, 1), 0.0)
FLAGS = (
    *("--dataset_file", "coco", "--backbone_name", "swin_test", "--pre_trained", "none"),
    *("--det_token_num", "8", "--dec_layers", "1", "--dim_feedforward", "64"),
    *("--reduced_dim", "64", "--pos_dim", "32", "--eval_size", "64", "--train_sizes", "48,64"),
    *("--batch_size", "4", "--epochs", "2", "--num_workers", "0", "--log_interval", "1"),
)


@dataclass(frozen=True)
class Picture:
    """Rectangles on grey noise; a box is (x, y, width, height, class, is crowd), in pixels."""

    height: int
    width: int
    boxes: tuple[tuple[int, int, int, int, int, int], ...]


def random_pictures(
    count: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES
) -> list[Picture]:
    """One to three boxes each; the fourth picture, and every twelfth after it, has none."""
    random = np.random.default_rng(seed)
    pictures = []
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        boxes = []
        for _ in range(0 if index % 12 == 3 else random.integers(1, 4)):
            w, h = random.integers(12, 32, 2)
            x, y = random.integers(0, width - w), random.integers(0, height - h)
            boxes.append((int(x), int(y), int(w), int(h), int(random.integers(len(NAMES))), 0))
        pictures.append(Picture(height, width, tuple(boxes)))
    return pictures


def write_coco(
    root: Path,
    train_pictures: Sequence[Picture],
    val_pictures: Sequence[Picture],
    *,
    ids: Sequence[int] = (1, 2, 3),
    names: Sequence[str] = NAMES,
) -> Path:
    """Write a COCO 2017 folder; `ids` and `names` list the categories in the order of the files."""
    for split, pictures in (("train", train_pictures), ("val", val_pictures)):
        write_split(root, split, pictures, ids=ids, names=names)
    return root


def write_split(
    root: Path,
    split: str,
    pictures: Sequence[Picture],
    *,
    ids: Sequence[int] = (1, 2, 3),
    names: Sequence[str] = NAMES,
) -> None:
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id, picture in enumerate(pictures, 101):
        file_name = f"{image_id}.png"
        images.append(
            {
                "id": image_id,
                "file_name": file_name,
                "width": picture.width,
                "height": picture.height,
            }
        )
        draw(picture, image_id).save(folder / file_name)
        for x, y, width, height, label, crowd in picture.boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[label],
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": crowd,
                }
            )
    categories = [{"id": own, "name": name} for own, name in zip(ids, names, strict=True)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def draw(picture: Picture, seed: int) -> Image.Image:
    shape = (picture.height, picture.width, 3)
    pixels = np.random.default_rng(seed).integers(90, 150, shape).astype(np.uint8)
    for x, y, width, height, label, _ in picture.boxes:
        pixels[y : y + height, x : x + width] = COLOURS[label]
    return Image.fromarray(pixels)


def settings(data: Path, output: Path, *flags: str) -> tuple[TrainConfig, dict[str, Any]]:
    """`flags` are split at blanks and override those of `FLAGS`."""
    return parse(argv(data, output, *flags))


def argv(data: Path, output: Path, *flags: str) -> list[str]:
    given = [word for some in flags for word in some.split()]
    names = {word for word in given if word.startswith("--")}
    ours = ("--coco_path", str(data), "--output_dir", str(output), *FLAGS)
    kept = [
        word
        for name, value in zip(ours[::2], ours[1::2], strict=True)
        if name not in names
        for word in (name, value)
    ]
    return [*kept, *given]


def tables(config: TrainConfig, fields: dict[str, Any]) -> tuple[SampleTable, SampleTable]:
    train_set, val_set, _ = read_datasets(
        config,
        num_queries=fields["det_token_num"],
        num_classes=fields["num_classes"],
        masks=fields["with_vector"],
        token_label=fields["token_label"],
    )
    return train_set, val_set


def cpu(**more: Any) -> Accelerator:
    return Accelerator(cpu=True, rng_types=[], **more)


def run(
    data: Path,
    output: Path,
    *flags: str,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, float]:
    """Train in this process and return the metrics of the best evaluation."""
    config, fields = settings(data, output, *flags)
    return train(config, fields, *tables(config, fields), report, accelerator=cpu())


def environment(**more: str) -> dict[str, str]:
    """The environment for a subprocess: one thread, no GPU, no variables of a launcher."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    ours = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **ours, **more}


def published(data: Path, output: Path, *flags: str) -> list[str]:
    """Arguments for a subprocess, which knows only published backbones."""
    return argv(data, output, "--backbone_name swin_nano", *flags)


def command(data: Path, output: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "trainer/train.py"), *published(data, output, *flags)]


def call(words: Sequence[str], *, timeout: float = 120, **more: str) -> subprocess.CompletedProcess:
    """Run a command in the root of the repository; an exit code other than 0 raises nothing."""
    return subprocess.run(
        words, env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def main_here(words: Sequence[str]) -> int:
    """Run the trainer's command line in this process and return its exit code."""
    with swapped(sys, "argv", ["train.py", *words]):
        try:
            trainer.train.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def program(name: str) -> str:
    """Path of a program in the virtual environment of the tests, such as accelerate or torchrun."""
    return str(Path(sys.executable).with_name(name))


def last_checkpoint(output: Path) -> Path:
    return resume.checkpoints(output / "checkpoints")[0]


def newest_checkpoint(wanted: Path) -> tuple[Path | None, list[str]]:
    """The path of the checkpoint that a run would resume from, and what it would skip."""
    checkpoint, skipped = resume.find(wanted)
    return (checkpoint.path if checkpoint else None), skipped


def end_of(output: Path) -> dict[str, Any]:
    """Everything in a finished run that must not depend on how often the run was interrupted."""
    checkpoint = resume.load(last_checkpoint(output))
    state, tensors = checkpoint.state, checkpoint.tensors
    facts: dict[str, Any] = {f"state/{name}": value for name, value in vars(state).items()}
    del facts["state/settings"]  # where the results are
    files = ("best.safetensors", "last.safetensors")
    weights = {f"{n}/{key}": t for n in files for key, t in load_file(output / n).items()}
    return facts | tensors | weights


def numbers_of(evaluation: Evaluation) -> dict[str, float]:
    """The metrics and the diagnosis as flat numbers: thresholds, confusions, worst images."""
    diagnosis = evaluation.diagnosis
    numbers = dict(evaluation.metrics)
    for curve in (*diagnosis.curves, diagnosis.together):
        numbers[f"threshold {curve.name}"] = curve.best.threshold if curve.best else -1.0
    for place, count in np.ndenumerate(diagnosis.confusion):
        numbers[f"confusion {place}"] = float(count)
    for rank, judged in enumerate(diagnosis.worst):
        numbers[f"worst {rank}"] = judged.index + judged.num_mistakes / 100
    return numbers


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of the entries that differ; tensors are compared bit for bit."""
    names = sorted({*first, *second})
    return [n for n in names if not same(first.get(n), second.get(n))]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        whole = first.dtype == second.dtype and first.shape == second.shape
        return whole and first.numpy().tobytes() == second.numpy().tobytes()
    return bool(first == second)


@dataclass(frozen=True)
class Learnt:
    """A run that memorised its pictures, and its evaluations by step."""

    data: Path
    output: Path
    scores: dict[int, dict[str, float]]

    @property
    def weights(self) -> Path:
        return self.output / "best.safetensors"


class Crash(Exception):
    """Raised from a report to break a run off at that point, as a kill would."""


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute inside the block; for processes without pytest's monkeypatch."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def gradients_of_step(
    config: TrainConfig,
    fields: dict[str, Any],
    train_set: SampleTable,
    step: int,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Gradients by parameter name that the loop would apply at `step`, summed over the processes.

    Noise on every weight keeps the detector away from its initial zeros.
    """
    torch.manual_seed(0)
    model_config = ViDTConfig(**{**fields, "num_classes": len(NAMES)})
    model = blurred(build_detector(model_config)).train()
    dataset = DetectionDataset(
        train_set,
        Augmentation.from_config(config),
        Preprocessing(config.eval_size),
        seed=config.seed,
        denoising=Denoising(config.denoising),
    )
    steps = range(step, step + 1)
    batches = micro_batches(dataset, config, config.n_iter_to_acc, steps, accelerator)
    window = list(batches)
    assert len(window) == config.n_iter_to_acc
    agreement = Agreement(accelerator)
    num_boxes, canvas, *_ = agree_on(window, 0, agreement)
    teacher = load_teacher(config, model.config, accelerator, agreement)
    prepared = accelerator.prepare_model(model, evaluation_mode=True).train()
    criterion = criterion_for(model_config)
    gradient_sum = GradientSum(model.parameters(), accelerator.num_processes)
    terms = gradients(
        prepared,
        criterion,
        accelerator,
        window,
        canvas,
        num_boxes,
        teacher,
        gradient_sum=gradient_sum,
    )
    assert terms is not None
    gradient_sum.take(agreement.gather(*gradient_sum.present()).any(0).tolist())
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of any gradient and the name of its parameter.

    Differences are relative to the largest entry of the tensor, or to a thousandth of the largest
    entry of all tensors if that is more: below it there is nothing but rounding.
    """
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(tensor.abs().max()) for tensor in expected.values())
    shares = {
        name: float((found[name] - tensor).abs().max()) / max(float(tensor.abs().max()), floor)
        for name, tensor in expected.items()
    }
    worst = max(shares, key=lambda name: shares[name])
    return shares[worst], worst


def blurred(model: Model) -> Model:
    """Add noise to every weight: a detector's initial zeros hide which output depends on what."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


if __name__ == "__main__":
    trainer.train.main()  # the command line, which now knows the backbones above
