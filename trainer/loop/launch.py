"""The processes, the device and the precision of a run, as its launcher was asked for them.

`accelerate launch` silently starts one process instead of several with `--cpu`, or with a config
file whose `distributed_type` is NO or MULTI_CPU, and `--gpu_ids 0,1` does not change the number of
processes. It does not pass on what it was asked, so this file reads its command line; without /proc
that is unknown.
"""

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config import default_config_file
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from trainer.backward.memory import use_expandable_segments
from trainer.loop.agreement import DEVICE_PATIENCE
from trainer.settings.flags import ConfigError
from vidt.errors import UserError, counted
from vidt.ops.precision import best_precision
from vidt.predict.predictor import require_working_gpu

# Variables by which the launcher asks to split the model over processes.
_SPLIT_BY = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor or context parallel)",
}


def make_accelerator(mixed_precision: str = "auto") -> Accelerator:
    """An accelerator without trackers, in the precision of `--mixed_precision`; the launcher sets
    the processes.
    """
    use_expandable_segments()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or cpu_of_launcher():
        device = torch.device("cpu")
    precision, _ = choose_precision(mixed_precision, device)
    # Without a GPU, `cpu` must be set: otherwise every process believes that it is alone.
    try:
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision,
            # The loop splits batches itself; a number in the environment would divide the loss.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=DEVICE_PATIENCE)],
            rng_types=[],
        )
    except ValueError as error:  # such as a precision that the device does not have
        raise UserError(f"accelerate refuses the launcher's settings: {error}") from error


def choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """The precision that `--mixed_precision` stands for on a device, and why. bf16 or fp16 given to
    the launcher wins over auto; its "no" means nothing, because it says so without being asked.
    """
    of_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "auto":
        return asked, "as asked"
    if of_launcher != "no":
        return of_launcher, "as asked of the launcher"
    return best_precision(device)


def precision_line(asked: str, accelerator: Accelerator) -> str:
    """The precision of a run, and why, in a few words."""
    precision, device = accelerator.mixed_precision, accelerator.device
    if precision == "fp16" and device.type == "cpu":
        return "fp16 asked for, but a CPU computes fp32 (bf16 works)"
    chosen, reason = choose_precision(asked, device)
    name = "fp32" if precision == "no" else precision
    return f"{name} ({reason if chosen == precision else 'as the accelerator was made'})"


def asked_processes() -> int | None:
    """Number of processes asked of the launcher; None without a launcher or if unknown."""
    if "WORLD_SIZE" in os.environ:  # torchrun, also under accelerate, starts them all
        return int(os.environ["WORLD_SIZE"])
    return asked_of_accelerate(_command_of_launcher())


def require_processes(num_processes: int) -> None:
    """Raises ConfigError if the launcher was asked for more processes than the run has, or for more
    GPUs than this machine has processes.
    """
    gpus = gpus_of_accelerate(_command_of_launcher())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if len(gpus) > here:
        ids = ",".join(gpus)
        raise ConfigError(
            f"--gpu_ids {ids} names {len(gpus)} GPUs, but the launcher starts "
            f"{counted(here, 'process', 'processes')} here; add --num_processes {len(gpus)}, or "
            f"name one GPU with CUDA_VISIBLE_DEVICES={gpus[0]} in place of --gpu_ids"
        )
    asked = asked_processes()
    if asked is not None and asked > num_processes:
        raise ConfigError(
            f"asked for {asked} processes, {num_processes} started; use "
            f"`accelerate launch --multi_gpu --num_processes {asked}` without --cpu, or torchrun"
        )


def cpu_of_launcher() -> bool:
    """Whether the launcher was given --cpu."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def refuse_silent_cpu() -> None:
    """Raises UserError if this machine has a GPU that PyTorch cannot use, unless the CPU was asked
    for: a run must not take weeks unawares.
    """
    if not cpu_of_launcher():
        require_working_gpu()


def refuse_split_models() -> None:
    """Raises ConfigError if the launcher splits the model, as FSDP and DeepSpeed do, or wraps it,
    as a dynamo backend does: the loop sums gradients and saves weights itself.

    Call it before making an Accelerator, which would first ask for those packages.
    """
    for variable, name in _SPLIT_BY.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"{name} is not supported: every process must hold the whole model; launch with "
                "distributed_type MULTI_GPU"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise ConfigError(
            f"the launcher's dynamo_backend {backend} would compile the whole model and rename its "
            "weights; launch with dynamo_backend no, and pass --compile to the script"
        )


def asked_of_accelerate(words: Sequence[str]) -> int | None:
    """`num_processes` from an `accelerate launch` command line or from the config file it uses."""
    options = _launch_options(words)
    if options is None:
        return None
    parser = ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    parser.add_argument("--cpu", action="store_true")
    asked, _ = parser.parse_known_args(options)
    if asked.num_processes is None:
        asked.num_processes = _num_processes(asked.config_file or _default_file(asked.cpu))
    return asked.num_processes


def gpus_of_accelerate(words: Sequence[str]) -> list[str]:
    """The ids of `--gpu_ids` from an `accelerate launch` command line; empty for all GPUs."""
    parser = ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--gpu_ids", "--gpu-ids", default="all")
    asked, _ = parser.parse_known_args(_launch_options(words) or [])
    return [] if asked.gpu_ids == "all" else asked.gpu_ids.split(",")


def _command_of_launcher() -> list[str]:
    """The words of the program that started this one; empty if unknown."""
    try:
        words = os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes())
    except OSError:
        return []
    return words.split("\0")[:-1]


def _launch_options(words: Sequence[str]) -> list[str] | None:
    """Options of the launcher and of its script; None for another program."""
    for index, word in enumerate(words):
        name = Path(word).name
        if (
            name in ("accelerate", "accelerate.commands.accelerate_cli")
            and "launch" in words[index:]
        ):
            return list(words[words.index("launch", index) + 1 :])
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return list(words[index + 1 :])
    return None


def _default_file(cpu: bool) -> str | None:
    """The file written by `accelerate config`, which launch ignores with --cpu."""
    return default_config_file if os.path.isfile(default_config_file) and not cpu else None


def _num_processes(config_file: str | None) -> int | None:
    if config_file is None:
        return None
    content = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    return content.get("num_processes")
