"""The program that the platform starts: `python -m ymir_adapter`. Reads the task, runs it in
processes of its own, and reports how it ended.

Exit codes: 0 done, 1 failed, 143 and 130 stopped by SIGTERM and SIGINT.
"""

import sys
import time
import traceback

from ymir_adapter.launch import RankFailed, Terminated, run_ranks, stop_signals
from ymir_adapter.protocol.environment import read_identity
from ymir_adapter.protocol.errors import Code, Failure, diagnose
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.task import Task, read_task


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
    if failure.code == Code.CONTAINER and failure.traceback:
        print(failure.traceback, file=sys.stderr)
    monitor.error(failure.code, failure.message, failure.traceback)
    sys.stdout.flush()
    print(f"error {int(failure.code)}: {failure.message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
