import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import call, main_here, program
from torch.distributed import run

from trainer.loop import launch
from trainer.loop.agreement import PATIENCE
from trainer.loop.launch import (
    asked_of_accelerate,
    gpus_of_accelerate,
    refuse_silent_cpu,
    require_processes,
)
from trainer.settings.flags import ConfigError
from vidt.errors import UserError
from vidt.predict import predictor

ROOT = Path(__file__).parent.parent
CONFIG_FILE = str(ROOT / "accelerate_config.yaml")
PROBE = """
import os
from trainer.loop.launch import asked_processes
rank, precision = os.environ.get("RANK", "alone"), os.environ["ACCELERATE_MIXED_PRECISION"]
os.write(1, f"probe {rank} {precision} {asked_processes()}\\n".encode())
"""


def said_when_launched(tmp_path: Path, *options: str) -> list[str]:
    """What the processes that the real launcher starts say, sorted."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *options]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("probe"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the launcher is read in /proc")
def test_a_launcher_that_starts_one_process_of_two_is_seen(tmp_path: Path):
    said = said_when_launched(tmp_path, "--cpu", "--num_processes", "2", "--mixed_precision", "no")
    assert said == ["probe alone no 2"]


@pytest.mark.slow
def test_our_config_file_is_overridden_on_the_command_line(tmp_path: Path):
    options = ["--config_file", CONFIG_FILE, "--num_processes", "2", "--mixed_precision", "bf16"]
    assert said_when_launched(tmp_path, *options) == ["probe 0 bf16 2", "probe 1 bf16 2"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("python /bin/accelerate launch --num_processes 3 train.py --lr 1", 3),
        ("python -m accelerate.commands.accelerate_cli launch --cpu --num_processes 3 train.py", 3),
        ("accelerate-launch --num-processes=3 train.py", 3),
        ("python -m accelerate.commands.launch --cpu --num_processes 3 train.py", 3),
        (f"accelerate launch --config_file {CONFIG_FILE} train.py --config x.yaml", 1),
        (f"accelerate launch --config_file {CONFIG_FILE} --num_processes 2 train.py", 2),
        ("accelerate launch --cpu train.py", None),
        ("bash -c train", None),
        ("python train.py --num_processes 3", None),
        ("", None),
    ],
)
def test_reading_the_launchers_command_line(words: str, asked: int | None):
    assert asked_of_accelerate(words.split()) == asked


def test_fewer_processes_than_asked_for_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_processes(2)
    with pytest.raises(ConfigError, match="asked for 2 processes, 1 started"):
        require_processes(1)


@pytest.mark.parametrize(
    ("words", "gpus"),
    [
        (f"accelerate launch --config_file {CONFIG_FILE} --gpu_ids 0,1 train.py", ["0", "1"]),
        ("accelerate-launch --gpu-ids=3 train.py", ["3"]),
        ("accelerate launch --gpu_ids all train.py", []),
        ("accelerate launch train.py", []),
        ("torchrun train.py", []),
        ("", []),
    ],
)
def test_reading_the_gpus_of_the_command_line(words: str, gpus: list[str]):
    assert gpus_of_accelerate(words.split()) == gpus


@pytest.mark.parametrize(("processes", "local"), [(1, None), (2, 1)])
def test_gpus_without_a_process_are_an_error(
    processes: int, local: int | None, monkeypatch: pytest.MonkeyPatch
):
    """`local`: processes of this machine, where there are several machines."""
    words = ["accelerate", "launch", "--gpu_ids", "4,5", "train.py"]
    monkeypatch.setattr(launch, "_command_of_launcher", lambda: words)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    require_processes(2)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    with pytest.raises(ConfigError) as error:
        require_processes(processes)
    assert "--gpu_ids 4,5" in str(error.value) and "--num_processes 2" in str(error.value)
    assert "CUDA_VISIBLE_DEVICES=4" in str(error.value)


@pytest.mark.slow
def test_gpu_ids_of_the_real_launcher_are_refused():
    options = ("--config_file", CONFIG_FILE, "--gpu_ids", "0,1")
    done = call([program("accelerate"), "launch", *options, str(ROOT / "trainer/train.py")])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "--gpu_ids 0,1" in errors[0]


def test_gpus_wait_minutes_and_processes_hours(monkeypatch: pytest.MonkeyPatch):
    """While the main process scores, the others wait in the agreement's own group."""
    given: dict[str, object] = {}
    monkeypatch.setattr(launch, "Accelerator", lambda **settings: given.update(settings))
    launch.make_accelerator()
    (handler,) = given["kwargs_handlers"]  # type: ignore[attr-defined]
    assert 10 <= handler.timeout.total_seconds() / 60 <= 60 < PATIENCE.total_seconds() / 3600 * 60


def test_the_launchers_read_how_long_to_wait_for_a_stop(monkeypatch: pytest.MonkeyPatch):
    """As docs/many-gpus.md says; PyTorch before this setting always waited for 30 seconds."""
    arguments = run.get_args_parser().parse_args(["--nproc_per_node", "2", "train.py"])
    if not hasattr(arguments, "shutdown_timeout"):
        pytest.skip("this PyTorch has no such setting")
    assert run.config_from_args(arguments)[0].shutdown_timeout == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert run.config_from_args(arguments)[0].shutdown_timeout == 600


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_a_launcher_that_splits_the_model_is_refused(
    variable: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Whether the package that would do it is here or not."""
    monkeypatch.setenv(variable, "true")
    assert main_here([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name}") and "distributed_type MULTI_GPU" in line


def test_a_launcher_that_compiles_the_whole_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert main_here([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "dynamo_backend INDUCTOR" in line and "--compile" in line


def test_accumulation_of_the_launcher_does_not_divide_the_loss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert launch.make_accelerator("no").gradient_accumulation_steps == 1


@pytest.mark.slow
def test_fsdp_of_the_real_launcher_is_refused():
    options = ("--config_file", CONFIG_FILE, "--num_processes", "1", "--use_fsdp")
    done = call([program("accelerate"), "launch", *options, str(ROOT / "trainer/train.py")])
    assert done.returncode == 1  # the launcher's, for any code of ours
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "FSDP" in errors[0]


@pytest.mark.parametrize(
    ("driver", "cuda", "visible", "words"),
    [
        ("525.85.12", "13.2", None, "CUDA 13.2 needs driver 580"),
        ("525.85.12", "12.6", "7", "CUDA_VISIBLE_DEVICES is 7"),
        ("580.65.06", "13.2", None, "no GPU is visible"),
        ("580.65.06", None, None, "built without CUDA"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_stops_a_run(
    driver: str,
    cuda: str | None,
    visible: str | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The CPU would take over, weeks long and unnoticed, unless it was asked for."""
    file = tmp_path / "version"
    file.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Jan 28\n")
    monkeypatch.setattr(predictor, "NVIDIA_DRIVER", file)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert main_here(["--output_dir", str(tmp_path / "output")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"driver {driver}" in line and words in line and "CUDA_VISIBLE_DEVICES= " in line
    with pytest.raises(UserError, match=words):
        predictor.usable_device(None)
    predictor.usable_device("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    refuse_silent_cpu()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        refuse_silent_cpu()
        predictor.usable_device(None)


def test_a_machine_without_a_driver_computes_on_its_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(predictor, "NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    refuse_silent_cpu()
