"""Checks that the launcher started what the user asked for.

`accelerate launch` silently starts one process instead of several with `--cpu`, or with a config
file whose `distributed_type` is NO or MULTI_CPU, and `--gpu_ids 0,1` does not change the number of
processes. It does not pass on what it was asked, so this file reads its command line; without /proc
that is unknown.
"""

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import yaml
from accelerate.commands.config import default_config_file
from accelerate.utils import parse_flag_from_env

from trainer.settings.flags import ConfigError
from vidt.errors import counted
from vidt.predict.predictor import require_working_gpu

# Variables by which the launcher asks to split the model over processes.
_SPLIT_BY = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor or context parallel)",
}


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
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return []


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
