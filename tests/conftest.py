"""Fixtures for all tests, and the table of largest differences in the summary."""

import os
import shutil
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: the machine may be shared

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_plus import with_masks
from tiny_runs import Learnt, blurred, random_pictures, run, write_coco
from torch import Tensor

from trainer.report.progress import Progress
from vidt.model.vidt import ViDT, ViDTConfig

Compare = Callable[[str, Tensor, Tensor, float], None]
DIFFERENCE = "largest difference: "

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread_one_seed() -> Iterator[None]:
    """Give a test the same numbers alone and among others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compare(record_property: Callable[[str, object], None]) -> Compare:
    """compare(what, found, expected, allowed) fails above `allowed` and informs the summary."""

    def check(what: str, found: Tensor, expected: Tensor, allowed: float) -> None:
        assert found.shape == expected.shape, f"{what}: {found.shape}, not {expected.shape}"
        difference = (found.double() - expected.double()).abs().max().item()
        record_property(DIFFERENCE + what, (difference, allowed))
        assert difference <= allowed, f"{what} differs by {difference:.2e}, {allowed:.2e} allowed"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List, for everything that was compared, the case nearest to its limit."""
    nearest: dict[tuple[str, str], tuple[float, float, float, str]] = {}
    for report in (one for some in terminalreporter.stats.values() for one in some):
        test, _, case = getattr(report, "nodeid", "").rpartition("::")[2].partition("[")
        for name, value in getattr(report, "user_properties", ()):
            if name.startswith(DIFFERENCE):
                difference, allowed = value
                share = difference / allowed if allowed else difference
                row = (test, name.removeprefix(DIFFERENCE))
                entry = (share, difference, allowed, case.rstrip("]"))
                nearest[row] = max(nearest.get(row, entry), entry)
    if nearest:
        terminalreporter.section("largest differences, of those allowed")
    for (test, what), (_, difference, allowed, case) in nearest.items():
        terminalreporter.line(f"{test:<40} {what:<36} {difference:.1e} of {allowed:.1e}  {case}")


@pytest.fixture(scope="session")
def tiny_config() -> ViDTConfig:
    """The smallest backbone with the smallest decoder that still has every part."""
    return ViDTConfig(
        num_classes=3,
        det_token_num=7,
        reduced_dim=64,
        pos_dim=16,
        dec_layers=2,
        dim_feedforward=64,
        dropout=0.0,
    )


@pytest.fixture
def tiny_model(tiny_config: ViDTConfig) -> ViDT:
    return blurred(ViDT(tiny_config)).eval()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and five validation pictures of several sizes."""
    root = tmp_path_factory.mktemp("tiny")
    return write_coco(root, random_pictures(12, seed=0), random_pictures(5, seed=1))


@pytest.fixture(scope="session")
def masked_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of `tiny_data`; every second object has a mask."""
    return with_masks(tiny_data, tmp_path_factory.mktemp("masked") / "data")


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """A detector that has memorised four pictures, with scores between none and perfect.

    The category ids of the pictures have gaps and are out of order.
    """
    folder, pictures = tmp_path_factory.mktemp("learnt"), random_pictures(4, seed=0)
    data = write_coco(folder / "data", pictures, pictures, ids=(7, 900, 3))
    scores: dict[int, dict[str, float]] = {}

    def report(progress: Progress) -> None:
        if progress.event == "evaluation":
            scores[progress.step] = dict(progress.metrics)

    flags = "--epochs 40 --eval_interval 20 --save_interval 40 --lr 1e-3 --clip_max_norm 1"
    easy = "--dropout 0 --no-flip --no-crop --train_sizes 64 --ema_decay 0.9 --log_interval 20"
    run(data, folder / "output", flags, easy, report=report)
    return Learnt(data, folder / "output", scores)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder for a run's results, removed after the test: a checkpoint takes 100 MB."""
    folder = tmp_path / "room"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
