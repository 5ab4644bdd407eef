"""Two processes with a slow link between them: what the sum of their gradients adds to a step.

    .venv/bin/python benchmarks/overlap.py --rate 400mbit

Each process runs in a network namespace of its own; `tc` limits what each sends to the rate. That
needs root and the programs `ip` and `tc`. `--rate none` leaves the namespaces out and measures over
the machine's own loopback. The modes take turns, so that other work slows them alike:

- compute: the step without a sum;
- transfer: the sum alone, nothing computed;
- after: one all-reduce once the backward pass has ended;
- overlap: `trainer.backward.gradient_sum.GradientSum`, as the trainer uses it;
- ddp: PyTorch's DistributedDataParallel.

A perfect overlap takes as long as the longer of compute and transfer.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.backward.gradient_sum import BUCKET_BYTES, GradientSum
from vidt.losses.criterion import criterion_for
from vidt.model.config import ViDTConfig
from vidt.model.vidt import build_detector

NAMES = ("vidt-overlap-0", "vidt-overlap-1")  # of the namespaces
ADDRESSES = ("10.231.7.1", "10.231.7.2")
INTERFACE = "veth0"  # in each namespace


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


@contextlib.contextmanager
def slow_link(rate: str) -> Iterator[None]:
    """Two namespaces joined by a cable, both ends limited to the rate."""
    try:
        for name in NAMES:
            ip(f"netns add {name}")
        first, second = NAMES
        ip(f"link add {INTERFACE} netns {first} type veth peer name {INTERFACE} netns {second}")
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip(f"-n {name} addr add {address}/24 dev {INTERFACE}")
            ip(f"-n {name} link set {INTERFACE} addrgenmode none up")  # IPv4 alone
            ip(f"-n {name} link set lo up")  # the first process calls its own address
            limit = f"tc qdisc add dev {INTERFACE} root tbf rate {rate} burst 256kb latency 200ms"
            ip(f"netns exec {name} {limit}")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def run_both(given: argparse.Namespace) -> int:
    """Runs the two processes, of which the first prints the results; returns the exit code."""
    slowed = given.rate != "none"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ours = {"WORLD_SIZE": "2", "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    if slowed:
        ours |= {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": INTERFACE}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    processes = []
    for rank, name in enumerate(NAMES):
        words = ["ip", "netns", "exec", name] if slowed else []
        words += [sys.executable, *sys.argv, "--rank", str(rank)]
        environment = {**os.environ, **threads, **ours, "RANK": str(rank)}
        processes.append(subprocess.Popen(words, env=environment))
    try:
        return max(process.wait() for process in processes)
    finally:
        for process in processes:
            process.kill()


class Step:
    """Forward pass, criterion and backward pass of a fixed batch."""

    def __init__(self, backbone: str, images: int, side: int) -> None:
        torch.manual_seed(0)
        config = ViDTConfig(backbone_name=backbone, num_classes=80)
        self.model: nn.Module = build_detector(config).train()
        self.criterion = criterion_for(config)
        self.images = torch.randn(images, 3, side, side)
        self.padding = torch.zeros(images, side, side, dtype=torch.bool)
        target = {"labels": torch.zeros(5, dtype=torch.int64), "boxes": torch.full((5, 4), 0.5)}
        self.targets = [target] * images

    @property
    def bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self, model: nn.Module) -> Tensor:
        self.model.zero_grad()
        outputs = model(self.images, self.padding, None)
        return torch.stack([*self.criterion(outputs, self.targets, num_boxes=10.0).values()]).sum()


def modes(given: argparse.Namespace) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """The modes' steps by name, and facts about them. Each has a model of its own: hooks stay."""
    size = (given.backbone, given.images, given.side)
    plain, overlapped, wrapped = (Step(*size) for _ in range(3))
    after = GradientSum(plain.parameters, 2, bucket_bytes=2**40)
    overlap = GradientSum(overlapped.parameters, 2)
    ddp = DistributedDataParallel(wrapped.model, bucket_cap_mb=BUCKET_BYTES // 2**20)
    facts = {"megabytes": plain.bytes / 1e6, "images": given.images}

    def sum_after() -> None:
        plain.loss(plain.model).backward()
        after.finish()

    def sum_meanwhile() -> None:
        loss = overlapped.loss(overlapped.model)
        overlap.begin()
        loss.backward()
        overlap.finish()

    return {
        "compute": lambda: plain.loss(plain.model).backward(),
        "transfer": after.finish,
        "after": sum_after,
        "overlap": sum_meanwhile,
        "ddp": lambda: wrapped.loss(ddp).backward(),
    }, facts


def measure(given: argparse.Namespace) -> dict[str, float]:
    """The fewest seconds of each mode; both processes begin each step together."""
    dist.init_process_group("gloo")
    works, results = modes(given)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(given.rounds + 1):
        for name, work in works.items():
            dist.barrier()
            began = time.perf_counter()
            work()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: min(each) for name, each in seconds.items()} | results


def report(results: dict[str, float], rate: str) -> None:
    limit = max(results["compute"], results["transfer"])
    print(f"link {rate}; " + ", ".join(f"{k} {v:.3g}" for k, v in results.items()))
    for name in ("after", "overlap", "ddp"):
        ratio = results[name] / limit
        print(f"{name:8} {results[name]:.3f} s, {ratio:.2f} of max(compute, transfer)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default="400mbit", help="as tc takes it, or none")
    parser.add_argument("--backbone", default="swin_nano")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces go too
        with slow_link(given.rate) if given.rate != "none" else contextlib.nullcontext():
            sys.exit(run_both(given))
    results = measure(given)
    if given.rank == 0:
        report(results, given.rate)
        if given.json:
            with open(given.json, "w") as file:
                json.dump(results, file, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
