"""Mining and inference tasks on tiny pictures, run by one process or by two.

Usage, as one of two ranks: python ymir_candidates.py ENV_FILE ...
"""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tiny_runs import NAMES, ROOT, cpu, environment
from ymir_runs import CHECKER, TIMEOUT, Tree

from trainer.train import make_accelerator
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.task import read_task
from ymir_adapter.tasks.candidates import process_candidates


@dataclass(frozen=True)
class Results:
    """The results that the platform reads back; None for missing files."""

    tree: Tree

    @property
    def ranking(self) -> list[tuple[str, float]] | None:
        path = self.tree.output / "result.tsv"
        if not path.exists():
            return None
        rows = (line.split("\t") for line in path.read_text().splitlines())
        return [(Path(asset).name, float(score)) for asset, score in rows]

    @property
    def scores(self) -> dict[str, float]:
        return dict(self.ranking or [])

    @property
    def boxes(self) -> dict[str, Any] | None:
        """Boxes by image, in the order of the JSON file; their key depends on the protocol."""
        path = self.tree.output / "infer-result.json"
        if not path.exists():
            return None
        document = json.loads(path.read_text())["detection"]
        return {name: next(iter(image.values())) for name, image in document.items()}


def candidate_task(
    root: Path,
    images: Sequence[Path],
    weights: Path,
    *,
    mining: bool = False,
    infer: bool = False,
    protocol: str | None = "1.1.0",
    names: Sequence[str] = NAMES,
    **config: Any,
) -> Tree:
    """Write a task on these images, in this order; the images are not copied."""
    tree = Tree(root)
    for folder in (root / "in", tree.output):
        folder.mkdir(parents=True)
    (root / "in/candidates.tsv").write_text("".join(f"{image}\n" for image in images))
    env: dict[str, Any] = {"task_id": "t1", "run_mining": mining, "run_infer": infer}
    if protocol is not None:
        env["protocol_version"] = protocol
    env["input"] = {
        "root_dir": str(root / "in"),
        "candidate_index_file": str(root / "in/candidates.tsv"),
        "config_file": str(root / "in/config.yaml"),
    }
    env["output"] = {
        "root_dir": str(tree.output),
        "mining_result_file": str(tree.output / "result.tsv"),
        "infer_result_file": str(tree.output / "infer-result.json"),
        "monitor_file": str(tree.monitor),
    }
    tree.env_file.write_text(yaml.safe_dump(env))
    own = {"gpu_id": "", "num_workers_per_gpu": 0, "model_params_path": [str(weights)]}
    values = {**own, "class_names": list(names), **config}
    (root / "in/config.yaml").write_text(yaml.safe_dump(values))
    return tree


def run_here(tree: Tree) -> Results:
    """Run a task in this process, as the only rank."""
    task = read_task(tree.env_file)
    process_candidates(task, Monitor(tree.monitor, task.task_id), cpu())
    return Results(tree)


def run_by_two(*trees: Tree) -> str:
    """Run tasks one after the other in two processes and return their output.

    There is no launcher around them, which saves time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, __file__, *(str(tree.env_file) for tree in trees)]
    own = {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
    }
    ranks = [
        subprocess.Popen(
            words,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **own),
            cwd=trees[0].root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = "".join(rank.communicate(timeout=TIMEOUT)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return said


def complaints(tree: Tree, task: str) -> str:
    """What the platform's checker has against a run that ended well; "" if nothing."""
    words = ["--in", tree.root / "in", "--out", tree.output, "--task", task, "--exit-code", "0"]
    done = subprocess.run(
        [sys.executable, str(CHECKER), *map(str, words)], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    accelerator = make_accelerator()
    for env_file in sys.argv[1:]:
        task = read_task(env_file)
        monitor = Monitor(task.output.monitor_file, task.task_id)
        process_candidates(task, monitor if accelerator.is_main_process else None, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
