"""How much of the project's code runs: from `main()` to the first `backward()` of the main job, and
in `ViDT.forward` of a Swin. And how long the packages, their files and their functions are.

    python benchmarks/functions.py [--largest 15] [--json FILE] [-- FLAGS OF THE TRAINER]

A function counts once, however often it runs, with every line of its code and not only those that
ran; module and class bodies are left out. The files of those functions count whole. The job runs
without loader processes, so that the augmentation's functions count as well.
"""

import argparse
import ast
import inspect
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import trainer.train
from vidt import ViDT, ViDTConfig

ROOT = Path(trainer.__file__).parent.parent
PACKAGES = ("vidt", "trainer", "ymir_adapter")
JOB = ("--max_steps", "1", "--num_workers", "0")


class BackwardReached(BaseException):
    """Ends the job at its first backward pass; no handler of the trainer catches it."""


@contextmanager
def recorded() -> Iterator[set[CodeType]]:
    """The code of every function of ours that is entered inside the block, in this thread."""
    functions: set[CodeType] = set()
    folders = tuple(f"{ROOT / package}/" for package in PACKAGES)

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        # Only functions have fast locals: modules and class bodies do not.
        if (
            code.co_flags & inspect.CO_OPTIMIZED
            and code.co_filename.startswith(folders)
            and code.co_filename.endswith(".py")  # jinja2 compiles templates under their own names
        ):
            functions.add(code)

    sys.settrace(note)
    try:
        yield functions
    finally:
        sys.settrace(None)


def functions_to_backward(flags: list[str]) -> set[CodeType]:
    """The functions that run from `main()` of the trainer to its first `backward()`."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise BackwardReached

    backward, torch.Tensor.backward = torch.Tensor.backward, stop  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as output, recorded() as functions:
            trainer.train.main(["--output_dir", output, *JOB, *flags])
    except BackwardReached:
        return functions
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    raise RuntimeError("the job ended without a backward pass")


def functions_of_forward() -> set[CodeType]:
    """The functions that run in one forward pass of a Swin detector, in training."""
    model = ViDT(ViDTConfig(backbone_name="swin_nano")).train()
    images, padding = torch.randn(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.bool)
    with recorded() as functions:
        model(images, padding)
    return functions


def lines_of(code: CodeType) -> set[tuple[str, int]]:
    """File and number of each line of a function's code; not those of functions inside it."""
    return {(code.co_filename, line) for _, _, line in code.co_lines() if line}


def length(path: str | Path) -> int:
    return len(Path(path).read_text().splitlines())


def account(functions: set[CodeType]) -> dict[str, Any]:
    """Counts of functions, of their code lines, and of their files and those files' lines."""
    lines = {line for code in functions for line in lines_of(code)}
    used = Counter(path for path, _ in lines)
    files = {path: length(path) for path in {code.co_filename for code in functions}}
    return {
        "functions": len(functions),
        "code_lines": len(lines),
        "files": len(files),
        "file_lines": sum(files.values()),
        "code_lines_by_room": ranked(by_room({short(path): used[path] for path in used})),
        "longest_files": ranked({short(path): size for path, size in files.items()}),
        "most_used_files": ranked({short(path): count for path, count in used.items()}),
        "longest_functions": ranked(
            {
                f"{short(code.co_filename)}:{code.co_firstlineno} {code.co_qualname}": len(
                    lines_of(code)
                )
                for code in functions
            }
        ),
    }


def sizes() -> dict[str, Any]:
    """Lines of the packages, and the median lengths of their files and functions.

    An `__init__.py` counts among the lines and not in the median: it is a sentence about its room.
    """
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files = {short(path): length(path) for path in paths}
    functions = {
        f"{short(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno)
        - node.lineno
        + 1
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    return {
        "lines": sum(files.values()),
        "files": len(files),
        "median_file": statistics.median(
            size for name, size in files.items() if not name.endswith("__init__.py")
        ),
        "functions": len(functions),
        "median_function": statistics.median(functions.values()),
        "lines_by_room": ranked(by_room(files)),
        "longest_files": ranked(files),
        "longest_functions": ranked(functions),
    }


def short(path: str | Path) -> str:
    return str(Path(path).relative_to(ROOT))


def by_room(sizes: dict[str, int]) -> dict[str, int]:
    """Sums over the files of each folder."""
    rooms: Counter[str] = Counter()
    for name, size in sizes.items():
        rooms[str(Path(name).parent)] += size
    return dict(rooms)


def ranked(sizes: dict[str, int]) -> dict[str, int]:
    """The largest first."""
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def print_account(title: str, facts: dict[str, Any], largest: int) -> None:
    numbers = {name: value for name, value in facts.items() if not isinstance(value, dict)}
    print(f"\n{title}: " + ", ".join(f"{name} {value:,}" for name, value in numbers.items()))
    for name, ranking in facts.items():
        if isinstance(ranking, dict):
            print(f"  {name}:")
            for subject, size in list(ranking.items())[:largest]:
                print(f"  {size:6,}  {subject}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--largest", type=int, default=15, help="rows of each ranking")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("flags", nargs="*", help="flags of the trainer, after --")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    facts = {
        "main() to the first backward()": account(functions_to_backward(args.flags)),
        "ViDT.forward of a Swin": account(functions_of_forward()),
        "all of " + ", ".join(PACKAGES): sizes(),
    }
    for title, part in facts.items():
        print_account(title, part, args.largest)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
