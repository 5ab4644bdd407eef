"""What can only be checked on a GPU, within a few minutes, the most valuable first.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only step_times kernels --json gpu.json
    python benchmarks/gpu.py --device cpu --quick

Sections: the tests that need a GPU; the trainer in every precision; loss and gradients beside the
CPU's; the time of training steps at one canvas and at new ones, eager and compiled; the kernels,
waits and attention of a step; the forms of the attention that Swin's windows and the [DET] tokens
could use; the forms of deformable attention. A section that fails prints its traceback, and the
next begins. With --device cpu --quick everything runs at toy sizes, to show that it works.
"""

import argparse
import csv
import json
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from contestants import OBJECTS, Case, Detector, random_objects
from laps import Clock, Laps, wait_for
from vidt import ViDT, ViDTConfig
from vidt.losses.criterion import criterion_for
from vidt.model.vidt import compile_blocks

ROOT = Path(__file__).parent.parent
GPU_TESTS = ("tests/test_deformable_triton.py", "tests/test_syncs.py")
NEW_CANVASES = 12
WARM_UP = 3


@dataclass(frozen=True)
class Setting:
    """The device and how large everything is."""

    device: torch.device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backbone_name(self) -> str:
        return "swin_nano" if self.quick else "swin_tiny"

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """(images, height, width) of a training step."""
        return [(1, 64, 64)] if self.quick else [(2, 640, 640), (16, 640, 640)]

    @property
    def precisions(self) -> list[tuple[str, str]]:
        """Precision, and PyTorch's name for that of float32 products: high is TF32."""
        half = [("bf16", "highest"), ("fp16", "highest")] if self.on_gpu else [("bf16", "highest")]
        return [*half, ("no", "high"), ("no", "highest")]


Section = Callable[[Setting], Any]


def machine(setting: Setting) -> dict[str, Any]:
    """What the figures depend on, and what Triton needs at its first use."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "gcc": shutil.which("gcc"),
        "Python.h": (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    }
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "cudnn": torch.backends.cudnn.version(),
        }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    return facts


def gpu_tests(setting: Setting) -> Any:
    """The tests that a machine without a GPU skips."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu or cuda", *GPU_TESTS]
    if setting.quick:
        words.append("--collect-only")
    return program(words, limit=600 if setting.quick else 150)


def trainer(setting: Setting) -> Any:
    """The main job for two epochs in every precision: the mean loss of each."""
    results = {}
    for precision in ("bf16", "no") if setting.quick else ("bf16", "fp16", "no"):
        with tempfile.TemporaryDirectory() as folder:
            words = ["-m", "accelerate.commands.accelerate_cli", "launch"]
            words += ["--config_file", "accelerate_config.yaml", "--mixed_precision", precision]
            words += ["trainer/train.py", "--epochs", "2", "--output_dir", folder]
            words += ["--pre_trained", "none"]
            words += ["--max_steps", "2"] if setting.quick else []
            program(words, limit=600 if setting.quick else 90)
            rows = [*csv.DictReader((Path(folder) / "metrics.csv").open())]
        results[precision] = [float(row["loss"]) for row in rows]
        losses = ", ".join(f"{loss:.2f}" for loss in results[precision])
        print(f"{precision}: mean loss of each epoch {losses}")
    return results


def program(words: list[str], *, limit: float) -> str:
    """Runs a Python program from the root of the project; prints and returns its last lines."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=limit
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    text = "\n".join(lines[-12:])
    print(text)
    assert done.returncode == 0, f"exit code {done.returncode}"
    return text


def agreement(setting: Setting) -> Any:
    """Loss and gradients of one step on the device relative to the CPU's in float32."""
    model = ViDT(ViDTConfig(backbone_name="swin_nano", dropout=0.0)).train()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0  # type: ignore[assignment]
    batch = batch_of((2, 160, 224), torch.device("cpu"))
    loss = learn(model, batch, "no")
    expected = {name: parameter.grad.clone() for name, parameter in parameters_of(model)}
    results = {}
    for precision, products in setting.precisions:
        with float32_products(products):
            model.zero_grad()
            model.to(setting.device)
            there = learn(model, to_device(batch, setting.device), precision)
            model.cpu()
        errors = {
            name: float((parameter.grad - expected[name]).norm() / (expected[name].norm() + 1e-9))
            for name, parameter in parameters_of(model)
        }
        worst = max(errors, key=lambda name: errors[name])
        name = f"{precision} {products}"
        results[name] = {"loss": there / loss, "worst": errors[worst], "name": worst}
        results[name]["median"] = statistics.median(errors.values())
        print(
            f"{name}: loss {there:.4f} (CPU {loss:.4f}); gradients differ by "
            f"{results[name]['median']:.1e} (median), {errors[worst]:.1e} at most, in {worst}"
        )
    return results


def parameters_of(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in model.named_parameters() if each.grad is not None]


def batch_of(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, list]:
    """Random images, of which the last is padded below and on the right, padding and targets."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size[0], 3, *size[1:], generator=generator)
    padding = torch.zeros(size, dtype=torch.bool)
    padding[-1, size[1] * 3 // 4 :] = True
    padding[-1, :, size[2] * 7 // 8 :] = True
    targets = [random_objects(torch.device("cpu")) for _ in images]
    return to_device((images, padding, targets), device)


def to_device(batch: tuple[Tensor, Tensor, list], device: torch.device) -> Any:
    images, padding, targets = batch
    moved = [{name: each.to(device) for name, each in target.items()} for target in targets]
    return images.to(device), padding.to(device), moved


def learn(model: nn.Module, batch: tuple[Tensor, Tensor, list], precision: str) -> float:
    """Forward, criterion and backward; returns the loss."""
    images, padding, targets = batch
    case = Case("swin_nano", tuple(padding.shape), False, str(images.device), precision, 1)  # type: ignore[arg-type]
    with case.autocast():
        outputs = model(images, padding)
    terms = criterion_for(model.config)(outputs, targets, len(images) * OBJECTS)  # type: ignore[arg-type]
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    return loss.item()


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def step_times(setting: Setting) -> Any:
    """Whole training steps: milliseconds, host's share, images per second, peak memory."""
    results: dict[str, Any] = {}
    print(f"{'images':<14}{'precision':<14}{'how':<10}{'canvas':<8}", end="")
    print(f"{'ms':>8}{'host ms':>9}{'images/s':>10}{'GiB':>7}")
    for size in setting.sizes:
        for precision, products in setting.precisions:
            for how in ("eager", "compiled"):
                if how == "compiled" and (setting.quick or precision == "fp16"):
                    continue
                with float32_products(products):
                    results |= times_of(setting, size, precision, products, how)
    return results


def times_of(
    setting: Setting, size: tuple[int, int, int], precision: str, products: str, how: str
) -> dict[str, Any]:
    case = Case(setting.backbone_name, size, False, str(setting.device), precision, 1)
    detector = Detector(case)
    detector.model.train()
    if how == "compiled":
        compile_blocks(detector.model)
    results = {}
    for canvas, canvases in ways(size, 3 if setting.quick else NEW_CANVASES).items():
        if setting.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = [step_time(detector, detector.model, each) for each in canvases][WARM_UP - 1 :]
        whole, host = (statistics.median(each) for each in zip(*taken, strict=True))
        peak = torch.cuda.max_memory_allocated() / 2**30 if setting.on_gpu else 0.0
        name = "x".join(map(str, size)), f"{precision} {products}", how, canvas
        print(f"{name[0]:<14}{name[1]:<14}{how:<10}{canvas:<8}", end="")
        print(f"{whole * 1e3:>8.1f}{host * 1e3:>9.1f}{size[0] / whole:>10.1f}{peak:>7.2f}")
        results[" ".join(name)] = {"seconds": whole, "host": host, "peak": peak}
    return results


def ways(size: tuple[int, int, int], count: int) -> dict[str, list[tuple[int, int]]]:
    """One canvas again and again, and smaller ones of which none comes twice."""
    _, height, width = size
    new = [(height - 16 * (i % 4), width - 16 * (i // 4)) for i in range(count)]
    return {"same": [(height, width)] * count, "new": new}


def step_time(detector: Detector, call: Any, canvas: tuple[int, int]) -> tuple[float, float]:
    """Seconds of a training step, and those after which the host was done with it."""
    device = torch.device(detector.case.device)
    detector.set_canvas(canvas)
    wait_for(device)
    start = time.perf_counter()
    detector.train(call, Laps(Clock(device)))
    host = time.perf_counter() - start
    wait_for(device)
    return time.perf_counter() - start, host


def kernels(setting: Setting) -> Any:
    """The kernels of a forward and backward pass in bf16, how busy the GPU is, and the waits."""
    size = setting.sizes[-1]
    model = ViDT(ViDTConfig(backbone_name=setting.backbone_name)).to(setting.device).train()
    batch = batch_of(size, setting.device)
    for _ in range(1 if setting.quick else WARM_UP):
        learn(model, batch, "bf16")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        learn(model, batch, "bf16")
        wait_for(setting.device)
        wall = time.perf_counter() - start
    spent: Counter[str] = Counter()
    number: Counter[str] = Counter()
    kind = torch.autograd.DeviceType.CUDA if setting.on_gpu else torch.autograd.DeviceType.CPU
    for event in profile.events():
        if event.device_type == kind:
            spent[event.name[:90]] += event.time_range.elapsed_us()
            number[event.name[:90]] += 1
    busy = sum(spent.values()) / 1e6
    print(f"{number.total()} kernels and copies; busy {busy * 1e3:.1f} of {wall * 1e3:.1f} ms")
    for name, microseconds in spent.most_common(20):
        print(f"{microseconds / 1e3:9.2f} ms {number[name]:5d} x {name}")
    words = ("fmha", "flash", "sdpa", "attention")
    attention = {name: number[name] for name in number if any(w in name.lower() for w in words)}
    print("attention:", attention)
    counted = waits(lambda: learn(model, batch, "bf16")) if setting.on_gpu else None
    print("waits:", counted, "(expected: 2, for the matcher's costs and for the loss read here)")
    return {"kernels": number.total(), "busy": busy, "wall": wall, "waits": counted}


def waits(work: Callable[[], object]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def attention(setting: Setting) -> Any:
    """SDPA by backend: windows of 49 tokens with a bias that learns, [DET] tokens with a mask."""
    images, heads = (1, 4) if setting.quick else (16 * 529, 3)
    windows = [attention_input(setting, (images, heads, 49, 32)) for _ in range(3)]
    bias = attention_input(setting, (1, heads, 49, 49))
    results: dict[str, Any] = {}
    for name, backend in (
        ("chosen", None),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("math", SDPBackend.MATH),
    ):
        if backend is SDPBackend.EFFICIENT_ATTENTION and not setting.on_gpu:
            continue
        with nullcontext() if backend is None else sdpa_kernel(backend):
            expanded = bias.expand(images, -1, -1, -1)
            query, key, value = windows
            results[f"windows {name}"] = milliseconds(setting, query, key, value, expanded)
        print(f"windows, {name}: {results[f'windows {name}']:.2f} ms")
    # 320, 448 and 576 are 64 modulo 128: gradients were NaN there in cuDNN, pytorch issue 196678.
    for keys in (40,) if setting.quick else (500, 501, 320, 448, 576):
        results[f"[DET] {keys}"] = det_attention(setting, keys)
    return results


def attention_input(setting: Setting, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.randn(shape, device=setting.device, dtype=torch.bfloat16)
    return tensor.requires_grad_()


def det_attention(setting: Setting, keys: int) -> dict[str, Any]:
    """100 queries on `keys` of which a third is masked."""
    images, heads = (1, 4) if setting.quick else (16, 24)
    query = attention_input(setting, (images, heads, 100, 32))
    key, value = (attention_input(setting, (images, heads, keys, 32)) for _ in range(2))
    mask = torch.zeros(images, 1, 1, keys, device=setting.device, dtype=torch.bfloat16)
    mask[..., : keys // 3] = -100
    taken = milliseconds(setting, query, key, value, mask)
    finite = all(bool(each.grad.isfinite().all()) for each in (query, key, value))  # type: ignore[union-attr]
    print(f"[DET] tokens on {keys} keys: {taken:.2f} ms, gradients finite: {finite}")
    return {"ms": taken, "finite": finite}


def milliseconds(
    setting: Setting, query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> float:
    """Of attention, forward and backward."""
    for _ in range(WARM_UP):
        F.scaled_dot_product_attention(query, key, value, mask).sum().backward()
    wait_for(setting.device)
    start = time.perf_counter()
    times = 1 if setting.quick else 10
    for _ in range(times):
        F.scaled_dot_product_attention(query, key, value, mask).sum().backward()
    wait_for(setting.device)
    return (time.perf_counter() - start) * 1e3 / times


def deformable(setting: Setting) -> Any:
    """`benchmarks/deformable.py`: every form that runs here."""
    words = ["benchmarks/deformable.py", "--device", str(setting.device), "--queries", "100"]
    if setting.quick:
        words += ["--size", "1x64x64", "--turns", "1"]
    return program(words, limit=600 if setting.quick else 90)


SECTIONS: tuple[Section, ...] = (
    gpu_tests,
    trainer,
    agreement,
    step_times,
    kernels,
    attention,
    deformable,
)


def run(section: Section, setting: Setting) -> Any:
    """The section's result; its traceback if it fails."""
    print(f"\n== {section.__name__}: {(section.__doc__ or '').strip()}", flush=True)
    start = time.monotonic()
    try:
        result = section(setting)
    except Exception:
        result = traceback.format_exc(limit=6)
        print(result)
    print(f"({time.monotonic() - start:.1f} s)", flush=True)
    if setting.on_gpu:
        torch.cuda.empty_cache()
    return result


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser(description="What can only be checked on a GPU.")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does all work?")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these sections")
    parser.add_argument(
        "--seconds", type=float, default=360.0, help="no section begins later (default 360)"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args(argv)
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU; --device cpu --quick shows that it runs")
    return given


def main() -> int:
    given = arguments()
    start = time.monotonic()
    setting = Setting(given.device, given.quick)
    results: dict[str, Any] = {"machine": machine(setting)}
    failed = []
    for section in SECTIONS:
        name = section.__name__
        if name not in given.only:
            continue
        if time.monotonic() - start > given.seconds:
            print(f"\n== {name}: no time left")
            continue
        results[name] = run(section, setting)
        if isinstance(results[name], str) and results[name].startswith("Traceback"):
            failed.append(name)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1, default=str))
    print(f"\nfailed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
