"""Every command in README.md and docs/ runs as it is written, on small files at the paths that the
pages name. Commands that a page marks as not run here are parsed.
"""

import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from doc_pages import Block, blocks_of, loose_coco, write_raccoons, write_voc, write_yolo
from PIL import Image
from test_architecture import PACKAGES
from tiny_plus import with_masks
from tiny_runs import (
    ROOT,
    Learnt,
    call,
    environment,
    main_here,
    program,
    swapped,
)
from torch.distributed.run import get_args_parser as torchrun_parser

from trainer import from_python
from trainer.commands import command_line, predict
from trainer.from_python import train as train_from_python
from trainer.settings.flags import HelpRequested
from trainer.settings.parsing import parse
from vidt import convert
from vidt.arguments import plain
from ymir_adapter.sandbox import __main__ as sandbox

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = ("text", "json", "xml", "yaml")  # kinds of blocks that are not run

# Appended to the flags of a page to make a run small; the last value of a flag counts.
SMALL_MODEL = (
    "--det_token_num 8 --dec_layers 1 --dim_feedforward 64 --reduced_dim 64 --pos_dim 32 "
    "--pre_trained none"
)
SMALL_RUN = (
    "--eval_size 64 --train_sizes 48,64 --num_workers 0 --batch_size 4 --epochs 50 --denoising 0 "
    "--hours none"
)
TINY_RUN = f"--backbone_name swin_test {SMALL_MODEL} {SMALL_RUN}"
SMALL = {  # by a word of the command; the first match counts
    "--help": "",
    "--eval": "--num_workers 0",
    "--resume": f"{TINY_RUN} --max_steps 41 --eval_interval 50",
    "": f"{TINY_RUN} --max_steps 1",
}
# Run by the real programs in subprocesses, which know only published backbones.
REAL_RUN = f"--backbone_name swin_nano {SMALL_MODEL} {SMALL_RUN} --batch_size 2 --max_steps 1"
REAL = {
    ("many-gpus.md", "one-machine.yaml --num_processes 2 trainer"): "",
    ("many-gpus.md", "torchrun"): "",
}
EXPORTS = (
    "exporting.md"  # an export takes ten seconds: other pages' exports must be among its commands
)
LONG = (
    *(EXPORTS, "README.md", "training-on-your-data.md", "first-day.md"),
    *("predicting.md", "fine-tuning.md", "many-gpus.md"),
)
SLOW = pytest.mark.slow
# Two launchers play two machines, in a test of their own.
TWO_MACHINES = "two-machines.yaml"
FORM = (
    "--set eval_size=64 --set batch_size_per_gpu=4 --set num_workers_per_gpu=0 "
    f"--set args_options='{SMALL_MODEL} --train_sizes 64 --save_interval 9'"
)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [
    (block, command) for block in BLOCKS if block.kind == "sh" for command in block.commands
]
EVERY_PAGE = pytest.mark.parametrize("page", [page.name for page in PAGES])


@pytest.fixture(scope="module")
def project(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files that the pages name, beside links to the repository's own."""
    root = tmp_path_factory.mktemp("docs") / "project"
    root.mkdir()
    with_masks(learnt.data, root / "data/coco")
    shutil.copytree(learnt.output, root / "output/coco")
    for name in ("output/teacher", "photos", "data/mine/images"):
        (root / name).mkdir(parents=True)
    shutil.copy(learnt.weights, root / "output/teacher")
    for number, path in enumerate(sorted((root / "data/coco/val2017").iterdir())):
        name = f"{number}.jpg" if number else "street.jpg"  # that one is 64 x 64
        Image.open(path).save(root / "photos" / name, quality=95)
    loose_coco(root / "data/mine", "images")
    loose_coco(root.parent / "shared/data/bccd", "images")
    (root / "data/mine/annotations").mkdir()
    for split in ("train", "val"):  # the same data in COCO's layout
        shutil.copy(
            root / f"data/mine/{split}.json",
            root / f"data/mine/annotations/instances_{split}2017.json",
        )
        shutil.copytree(root / "data/mine/images", root / f"data/mine/{split}2017")
    write_voc(root / "data/coco", root / "data/voc")
    write_yolo(root / "data/coco", root / "data/yolo")
    write_raccoons(root / "data/voc", root / "data/raccoon")
    shutil.copytree(root / "data/voc/Annotations", root / "data/labelled")
    shutil.copytree(root / "data/voc/JPEGImages", root / "data/labelled", dirs_exist_ok=True)
    for name in ("trainer", "docs", "accelerate_config.yaml"):
        (root / name).symlink_to(ROOT / name)
    yield root
    shutil.rmtree(root)


def small(words: Sequence[str]) -> list[str]:
    """The flags of a run of the trainer and those that make it small."""
    (more,) = [text for key, text in SMALL.items() if key in words or not key][:1]
    return [*words, *more.split()]


def check_flags(words: Sequence[str]) -> None:
    """Parse the trainer's flags as the page writes them."""
    try:
        parse(words)
    except HelpRequested:
        assert list(words) == ["--help"]


def launched(command: str) -> list[str] | None:
    """Flags of trainer/train.py in a launcher's command, or None if there is no launcher.

    The launcher's own flags are parsed too.
    """
    words = shlex.split(command)
    parser: ArgumentParser
    if words[:2] == ["accelerate", "launch"]:
        parser, words = launch_command_parser(), words[2:]
    elif words[0] == "torchrun":
        parser, words = torchrun_parser(), words[1:]
    else:
        return None
    given = parser.parse_args(words)
    assert given.training_script == "trainer/train.py"
    file = getattr(given, "config_file", None)
    assert file is None or (ROOT / file).is_file(), f"{file} is not there"
    check_flags(given.training_script_args)
    return list(given.training_script_args)


def check_only(command: str) -> None:
    """Check a command without running it."""
    words = shlex.split(command)
    if launched(command) is not None:
        return
    if words[:3] == ["python", "-m", "ymir_adapter.sandbox"]:
        sandbox.make_parser().parse_args(words[3:])
        return
    if words[:2] == ["vidt", "predict"]:
        predict.flags().parse_args(words[2:])
        return
    if words[:2] == ["vidt", "export"]:
        assert (EXPORTS, command) in [(block.page, line) for block, line in COMMANDS]
        return
    if words[:2] == ["vidt", "train"]:
        check_flags(words[2:])
        return
    if words[0] == "vidt":
        command_line.subcommand(words[1])[0]().parse_args(words[2:])
        return
    programs = ("docker", "git", "trtexec", "python3", "pip", ".venv/bin/python")
    assert words[0] in programs, f"unknown: {command}"
    if words[0] == "docker":
        arguments = re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        given = [words[at + 1] for at, word in enumerate(words) if word == "--build-arg"]
        assert all(each.partition("=")[0] in arguments for each in given), command
    for file in ("constraints.txt",):
        assert file not in words or (ROOT / file).is_file()


def run_here(command: str) -> None:
    """Run a command of a page in this process and the current folder."""
    capture = io.StringIO()
    before, _, target = command.partition(" > ")
    feeding, piped, last = before.rpartition(" | ")
    words = shlex.split(last)
    listed = ""
    if piped:
        listed = subprocess.run(
            shlex.split(feeding), capture_output=True, text=True, check=True
        ).stdout
    flags = launched(last)
    with swapped(sys, "stdin", io.StringIO(listed)), redirect_stdout(capture):
        if flags is not None:
            code = main_here(small(flags))
        elif words[:2] == ["vidt", "train"]:
            check_flags(words[2:])
            code = command_line.main(["train", *small(words[2:])])
        elif words[0] == "vidt":
            code = command_line.main(words[1:])
        elif words[:3] == ["python", "-m", "vidt.convert"]:
            code = convert.main(words[3:]) or 0
        else:
            raise AssertionError(f"this test knows no way to run: {command}")
    assert code == 0, f"{command}: exit code {code}\n{capture.getvalue()}"
    if target:
        Path(target).write_text(capture.getvalue())


@pytest.mark.parametrize(
    "page",
    [pytest.param(page.name, marks=SLOW if page.name in LONG else ()) for page in PAGES],
)
def test_what_a_page_says_runs(
    page: str, project: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the page from top to bottom in its own copy of the project."""
    shutil.copytree(project, room / "project", symlinks=True)
    (room / "shared").symlink_to(project.parent / "shared")
    monkeypatch.chdir(room / "project")
    for block in (each for each in BLOCKS if each.page == page):
        if block.kind == "python":
            with swapped(from_python, "train", small_train):
                exec(compile(block.text, f"{page}:{block.line}", "exec"), {})
        for command in block.commands if block.kind == "sh" else ():
            if block.why_not or is_elsewhere(block, command):
                check_only(command)
            else:
                run_here(command)


def small_train(**settings: Any) -> from_python.FinishedRun:
    """`vidt.train` as a page calls it, with the flags that make a run small."""
    words = f"{TINY_RUN} --max_steps 1".split()
    less = {
        flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)
    }
    return train_from_python(**{**settings, **less})


def is_elsewhere(block: Block, command: str) -> bool:
    """Does another test run the command, in real processes, or another page, if it is slow?"""
    if command.startswith("vidt export") and block.page != EXPORTS:
        return True
    return any(page == block.page and part in command for page, part in REAL) or any(
        part in command for part in (TWO_MACHINES, "ymir_adapter.sandbox")
    )


@pytest.mark.slow
@pytest.mark.parametrize(("page", "part"), REAL, ids=["accelerate", "torchrun"])
def test_several_processes(page: str, part: str, project: Path, room: Path) -> None:
    (command,) = [line for block, line in COMMANDS if block.page == page and part in line]
    first, *words = shlex.split(command)
    here = ("--output_dir", str(room))
    done = in_project([program(first), *words, *REAL_RUN.split(), *here], project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 images a step on 2 x cpu" in done.stdout + done.stderr
    assert (room / "best.safetensors").is_file()


def in_project(words: Sequence[str], project: Path) -> subprocess.CompletedProcess:
    inside = ["env", "-C", str(project), *words]
    return call(inside, timeout=240, PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_two_machines_played_by_two_launchers(project: Path, room: Path) -> None:
    """Run the page's file and commands; only address, processes and the run's size differ."""
    commands = [line for _, line in COMMANDS if TWO_MACHINES in line]
    assert ["--machine_rank 0" in line for line in commands] == [True, False]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = f"--num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}"
    started = []
    for line in commands:
        before, _, flags = line.removeprefix("accelerate ").partition(" trainer/train.py ")
        words = [*before.split(), *here.split(), "--mixed_precision", "no", "trainer/train.py"]
        words += [*flags.split(), *REAL_RUN.split(), "--output_dir", str(room)]
        started.append(
            subprocess.Popen(
                [program("accelerate"), *words],
                env=environment(PYTHONPATH=str(ROOT)),
                cwd=project,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = []
    try:
        for process in started:
            said.append(process.communicate(timeout=240)[0])
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert "4 images a step on 2 x cpu" in said[0]
    assert (room / "best.safetensors").is_file()


@pytest.mark.slow
def test_the_sandbox_as_the_page_has_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [line for _, line in COMMANDS if "ymir_adapter.sandbox" in line]
    commands = list(dict.fromkeys(found))  # the page in Chinese has the same
    assert len(commands) == 2
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the task, which is a process of its own
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for line in commands:
        words = shlex.split(line)
        training = "training" in words
        more = shlex.split(FORM) if training else ["--set", "num_workers_per_gpu=0"]
        assert sandbox.main([*words[3:], *more]) == 0, line
    assert (project / "try/candidates/out/infer-result.json").is_file()


@pytest.mark.slow
def test_the_installed_program_runs(project: Path) -> None:
    (command,) = [line for block, line in COMMANDS if block.page == "README.md" and "check" in line]
    first, *words = shlex.split(command)
    if not Path(program(first)).is_file():
        pytest.skip("the console script is not installed here")
    done = in_project([program(first), *words], project)
    assert done.returncode == 0, done.stderr
    assert "4 images, 6 boxes" in done.stdout


def test_the_readme_in_chinese_says_the_same() -> None:
    """Commands and links of README.md, in its order; comments and the other language differ."""
    contents = []
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        blocks = [
            (block.kind, block.why_not, re.sub(r"\s*#.*", "", block.text).split("\n"))
            for block in blocks_of(ROOT / name)
        ]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        links = re.findall(r"\]\(([^)]+)\)", prose)
        code = sorted(re.findall(r"`([^`]+)`", prose))
        shape = [line[:2] for line in text.splitlines() if line[:2] in ("# ", "##", "| ", "- ")]
        contents.append((blocks, [link for link in links if "README" not in link], code, shape))
        assert len(text.splitlines()) <= 150, name
    assert contents[0] == contents[1]


@EVERY_PAGE
def test_every_block_says_what_it_is(page: str) -> None:
    """No test would check a block without a kind or of an unknown one."""
    kinds = {block.kind for block in BLOCKS if block.page == page}
    assert kinds <= {"sh", "python", *SHOWN}
    for block in BLOCKS:
        assert block.why_not is None or block.kind == "sh"


@EVERY_PAGE
def test_links_and_files_exist(page: str) -> None:
    path = next(each for each in PAGES if each.name == page)
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    ours = r"`((?:tests|trainer|vidt|docs|benchmarks)/[\w/.-]+\.(?:py|yaml|md))`"
    for name in re.findall(ours, text):
        assert (ROOT / name).is_file() or "NAME" in name, name


@EVERY_PAGE
def test_flags_between_the_commands_exist(page: str) -> None:
    text = next(each for each in PAGES if each.name == page).read_text(encoding="utf-8")
    between = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    code = re.findall(r"`([^`]+)`", between)
    named = {plain(word.partition("=")[0]) for each in code for word in each.split()}
    unknown = {word for word in named if re.match(r"--[a-z]", word)} - known_flags()
    assert not unknown, f"{page} names flags that no program has: {unknown}"


def known_flags() -> set[str]:
    """Flags of every program that the pages name, with underscores."""
    with redirect_stdout(io.StringIO()) as trainers:
        command_line.main(["train", "--help"])
    flags = set(re.findall(r"--[a-z][\w-]*", trainers.getvalue()))
    parsers = [launch_command_parser(), torchrun_parser(), sandbox.make_parser()]
    for name in command_line.COMMANDS:
        if name != "train":
            parsers.append(command_line.subcommand(name)[0]())
    for parser in parsers:
        flags |= set(parser._option_string_actions)
    others = {"--kills", "--tag", "--build-arg", "--repeat", "--precision", "--logdir", "--check"}
    others |= {"--plus", "--casts", "--quick", "--folder", "--images_seed"}  # of benchmarks
    others |= {
        "--parts",
        "--rounds",
        "--sizes",
        "--seconds",
        "--seeds",
        "--together",
        "--yolo",
        "--imgsz",
    }
    negated = {f"--no_{flag[2:]}" for flag in flags}
    return {plain(flag) for flag in flags | others} | negated


@pytest.mark.parametrize("flag", ["--coco_path", "--voc_path", "--yolo_path"])
def test_the_formats_by_example_are_read(flag: str, tmp_path: Path) -> None:
    """Read the page's snippets with pictures of the size in them: two objects, or one."""
    titled = [block for block in BLOCKS if block.title]
    kinds = {"--coco_path": "annotations/", "--voc_path": ("Ann", "Image")}
    start = kinds.get(flag, ("data.yaml", "labels/"))
    ours = [block for block in titled if block.title.startswith(start)]
    folders = {"--coco_path": "{}2017", "--voc_path": "JPEGImages", "--yolo_path": "images/{}"}
    for split in ("train", "val"):
        for block in ours:
            target = tmp_path / block.title.replace("train", split)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
        folder = tmp_path / folders[flag].format(split)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (640, 480)).save(folder / "000001.jpg")
    with redirect_stdout(io.StringIO()) as said:
        assert command_line.main(["check", flag, str(tmp_path), "--json"]) == 0
    facts = json.loads(said.getvalue())
    assert "cat" in facts["classes"] and facts["usable"]
    boxes = 1 if flag == "--voc_path" else 2
    assert [split["boxes"] for split in facts["splits"]] == [boxes, boxes]
    kinds_found = {finding["kind"] for finding in facts["findings"]}
    # The same picture is in both splits, and there are few.
    assert kinds_found <= {
        "image in both training and validation",
        "class with fewer than 10 training boxes",
    }


def test_the_page_on_the_code_names_every_room() -> None:
    text = (ROOT / "docs/code-layout.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        for room in (path.parent for path in (ROOT / package).glob("*/__init__.py")):
            assert f"{room.name}/" in text, f"docs/code-layout.md does not name {room}"
