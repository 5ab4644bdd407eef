"""What a user asked the launcher for, and whether this run can be it.

How many processes were asked for is not always how many the launcher starts.

`accelerate launch` starts one process, and says nothing, when asked for several with `--cpu`, or
with a config file whose `distributed_type` is NO or MULTI_CPU. It does not hand the number on, so
its command line is read; where there is no /proc to read it in, the answer is "unknown".
"""

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import yaml
from accelerate.commands.config import default_config_file

from trainer.settings.flags import ConfigError

# Variables by which the launcher says that a model is to be split over processes.
_SPLIT_BY = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor or context parallel)",
}


def asked_processes() -> int | None:
    """Processes asked of the launcher of this process; None without a launcher, or if unknown."""
    if "WORLD_SIZE" in os.environ:  # torchrun, also underneath accelerate: it starts what was asked
        return int(os.environ["WORLD_SIZE"])
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return None
    return asked_of_accelerate(words)


def require_processes(num_processes: int) -> None:
    """Raises ConfigError when more processes were asked for than the run has."""
    asked = asked_processes()
    if asked is not None and asked > num_processes:
        raise ConfigError(
            f"asked for {asked} processes, {num_processes} started; use "
            f"`accelerate launch --multi_gpu --num_processes {asked}` without --cpu, or torchrun"
        )


def refuse_split_models() -> None:
    """Raises ConfigError when the launcher is to split the model, as FSDP and DeepSpeed do: the
    loop sums gradients by itself and saves whole weights, and was tried with whole models alone.

    To be called before there is an Accelerator: that one would first ask for their packages.
    """
    for variable, name in _SPLIT_BY.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"{name} is asked for, and was not tested with this trainer; launch with "
                "distributed_type MULTI_GPU, where every process holds the whole model"
            )


def asked_of_accelerate(words: Sequence[str]) -> int | None:
    """`num_processes` of an `accelerate launch` command line or of the config file that it uses."""
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


def _launch_options(words: Sequence[str]) -> list[str] | None:
    """Options of the launcher and of its script; None if this is another program."""
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
    """The file written by `accelerate config`, which launch does not look at with --cpu."""
    return default_config_file if os.path.isfile(default_config_file) and not cpu else None


def _num_processes(config_file: str | None) -> int | None:
    if config_file is None:
        return None
    content = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    return content.get("num_processes")
