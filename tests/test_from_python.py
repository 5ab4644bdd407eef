"""`vidt.train`: a run from Python, in this process and in several."""

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from tiny_runs import FLAGS, ROOT, argv, call, environment, main_here

import vidt
from trainer.from_python import FinishedRun, _as_flags
from trainer.loop.loss_log import NonFiniteLoss
from trainer.loop.step import train_step
from vidt.errors import UserError
from vidt.weights.weights_file import UnusableWeights

TINY: dict[str, Any] = {
    name.removeprefix("--"): value
    for name, value in zip(FLAGS[::2], FLAGS[1::2], strict=True)
    if name != "--dataset_file"
} | {"max_steps": 1}


def tiny(data: Path, room: Path, **more: Any) -> FinishedRun:
    return vidt.train(data, room, **{**TINY, **more})


@pytest.fixture(autouse=True)
def no_state_of_other_tests() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def test_settings_become_the_words_of_the_command_line() -> None:
    given = {"lr": 1e-4, "ema": False, "train_sizes": [64, 96], "max_steps": None, "resume": True}
    assert _as_flags({**given, "output_dir": Path("-a b")}) == [
        *("--lr=0.0001", "--ema=False", "--train_sizes=64,96", "--max_steps=None", "--resume"),
        "--output_dir=-a b",
    ]
    assert _as_flags({"resume": False}) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epoch": 3}, "no setting epoch; the nearest is epochs"),
        ({"learning_rate": 1e-3}, "no setting learning_rate; its name here is lr"),
        ({"lr": "fast"}, "--lr is 'fast'; it must be a number"),
        ({"eval": True, "load_from": "x.pth"}, "vidt.train has no eval"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"voc_path": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_one_error_and_the_process_lives(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        vidt.train(output_dir=tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not AcceleratorState._shared_state


@pytest.mark.slow
def test_two_runs_of_one_process(
    tiny_data: Path, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second in another precision, which Accelerate refuses in a process that has a state."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    level = logging.getLogger("trainer").level
    first = tiny(tiny_data, room / "first", mixed_precision="no")
    second = tiny(tiny_data, room / "second", mixed_precision="bf16", seed=3)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert logging.getLogger("trainer").level == level
    for run in (first, second):
        assert run.weights.is_file() and run.report.is_file()
        assert 0 <= run.metrics["map50"] <= 1
        assert run.detector(device="cpu").info.metrics == run.metrics
    assert first.weights.read_bytes() != second.weights.read_bytes()
    resumed = tiny(tiny_data, room / "first", mixed_precision="no", max_steps=2, resume=True)
    assert "resumed at step 1 to 2" in capsys.readouterr().out
    assert resumed.detector(device="cpu").class_names == first.detector(device="cpu").class_names


@pytest.mark.slow
def test_the_same_run_as_on_the_command_line(tiny_data: Path, room: Path) -> None:
    tiny(tiny_data, room / "python")
    assert main_here(argv(tiny_data, room / "shell", "--max_steps 1 --preset auto")) == 0
    for name in ("best.safetensors", "last.safetensors"):
        ours, theirs = ((room / way / name).read_bytes() for way in ("python", "shell"))
        start = 8 + int.from_bytes(ours[:8], "little")  # the header has the date
        assert ours[start:] == theirs[8 + int.from_bytes(theirs[:8], "little") :]


def test_in_a_thread(tiny_data: Path, room: Path) -> None:
    """As a user interface would call it; a thread cannot handle signals."""
    ended: list[FinishedRun] = []
    thread = threading.Thread(target=lambda: ended.append(tiny(tiny_data, room)))
    thread.start()
    thread.join()
    assert ended[0].weights.is_file()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved(
    tiny_data: Path, room: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signum)
        return train_step(*arguments)

    monkeypatch.setattr("trainer.train.train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="everything is saved, continue with resume=True"):
        tiny(tiny_data, room, max_steps=3)
    assert [*(room / "checkpoints").glob("step-*")]


SEVERAL = """
import sys, vidt
from vidt.errors import UserError
settings = dict(zip(sys.argv[3::2], sys.argv[4::2]))
settings["backbone_name"] = "swin_nano"
try:
    run = vidt.train(sys.argv[1], sys.argv[2], num_processes=2, **settings)
    print("map50", run.metrics["map50"])
except UserError as error:
    print("refused:", error)
import signal
term, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
print("as before:", term == signal.SIG_DFL, interrupt == signal.default_int_handler)
"""


@pytest.mark.slow
def test_two_processes(tiny_data: Path, room: Path) -> None:
    words = [str(word) for pair in TINY.items() for word in pair]
    done = call([sys.executable, "-c", SEVERAL, str(tiny_data), str(room), *words], timeout=300)
    assert "on 2 x cpu" in done.stdout and "map50 0." in done.stdout, done.stderr
    assert "as before: True True" in done.stdout
    nowhere = [str(room / "no"), str(room / "out"), *words]
    done = call([sys.executable, "-c", SEVERAL, *nowhere], timeout=300)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert str(room / "no") in line and "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [NonFiniteLoss("loss is nan"), UnusableWeights("no weights")])
def test_an_error_of_several_processes_comes_back_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(words: list[str]) -> None:
        raise error

    def launch(process: Callable[..., None], arguments: tuple[Any, ...], **options: Any) -> None:
        with pytest.raises(SystemExit):
            process(*arguments)
        raise RuntimeError("a process failed")

    monkeypatch.setattr("trainer.from_python._run", fail)
    monkeypatch.setattr("trainer.from_python.notebook_launcher", launch)
    expected = NonFiniteLoss if isinstance(error, NonFiniteLoss) else UserError
    with pytest.raises(expected, match=f"^{error}$"):
        vidt.train(output_dir=tmp_path, num_processes=2)


@pytest.mark.parametrize(
    ("used", "gpus", "said"),
    [(True, 0, "has used a GPU; restart it"), (False, 1, "this machine has 1 GPUs")],
)
def test_processes_that_cannot_be_forked_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: bool, gpus: int, said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: used)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(UserError, match=f"num_processes is 2, but .*{said}"):
        vidt.train(output_dir=tmp_path, num_processes=2)


def test_importing_vidt_does_not_import_the_trainer() -> None:
    code = "import sys, vidt; dir(vidt); print(any(n.startswith('trainer') for n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


NOTEBOOK = ROOT / "docs/first-detector.ipynb"


def test_the_notebook_holds_no_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if "outputs" in cell]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tiny_data: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell, on small data, with the settings of a small run added to the reader's."""
    monkeypatch.chdir(room)
    names: dict[str, Any] = {}
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "settings" in names and "run" not in names:
            names["settings"] |= TINY
            names["data"] = tiny_data
    assert (room / "output/first/best.safetensors").is_file()
    assert names["detections"].plot().size == (128, 128)
