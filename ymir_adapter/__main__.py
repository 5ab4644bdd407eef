"""The program that the platform starts: `python -m ymir_adapter`. Reads the task, runs it in
processes of its own, and reports how it ended.

Exit codes: 0 done, 1 failed, 143 and 130 stopped by SIGTERM and SIGINT.
"""

import sys
import time
import traceback
from dataclasses import replace

from vidt.errors import escaped
from ymir_adapter.launch import RankFailed, Terminated, run_ranks, stop_signals
from ymir_adapter.protocol.environment import read_identity
from ymir_adapter.protocol.errors import Code, Failure, diagnose
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.task import Task, in_form_words, read_task


def main(module: str | None = None) -> int:
    """Runs the task in ranks of `module`, by default that of the task. Returns the exit code."""
    task_id, monitor_file = read_identity()
    monitor, code = Monitor(monitor_file, task_id), 1
    try:
        with stop_signals():
            task = read_task()
            run_ranks(task, module or module_of(task), monitor)
        return 0
    except Terminated as stop:
        failure, code = Failure(Code.CONTAINER, str(stop), "", time.time()), stop.exit_code
    except RankFailed as failed:
        failure = failed.failure
    except Exception as error:
        failure = Failure(*diagnose(error), traceback.format_exc(), time.time())
    report(failure, monitor)
    return code


def module_of(task: Task) -> str:
    return "ymir_adapter.tasks.training" if task.run_training else "ymir_adapter.tasks.candidates"


def report(failure: Failure, monitor: Monitor) -> None:
    """Writes the error record, and prints the cause as the last line of all output."""
    failure = replace(failure, message=in_form_words(failure.message))
    if failure.mendable and failure.code == Code.CONTAINER:
        failure = replace(failure, code=Code.CONFIG)
    monitor.error(failure.code, failure.message, failure.traceback)
    sys.stdout.flush()
    print("\n".join(closing_lines(failure)), file=sys.stderr, flush=True)


def closing_lines(failure: Failure) -> list[str]:
    """Five lines or more. The platform shows users the last five of the output: without these some
    would be the launcher's. Only an unknown failure prints its traceback.
    """
    unknown = failure.code == Code.CONTAINER
    return [
        "-" * 80,
        f"The task failed: {failure.code.name.lower().replace('_', ' ')}, the last line says why.",
        "The complete log may say more above this line.",
        "The traceback, if there is one, is in monitor.txt.",
        *(failure.traceback.rstrip().splitlines() if unknown else []),
        f"error {int(failure.code)}: {escaped(failure.message)}",
    ]


if __name__ == "__main__":
    sys.exit(main())
