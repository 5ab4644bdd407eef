"""The image without a Docker engine: its Dockerfile, its forms, and its start command in a root
folder that is put together as the Dockerfile says.

The root is an overlay of this machine's own, in a mount namespace, with the platform's `/in`, which
is read-only, and `/out`; the user is one whom no password file knows. Where the machine does not
permit that, the command runs as this user, with relocated paths and folders made read-only.
"""

import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny_runs import ROOT, random_pictures, write_coco

from trainer.readers.coco import read_coco
from ymir_adapter.protocol.task import (
    TEMPLATE,
    CandidateSettings,
    candidate_settings,
    read_task,
    training_settings,
)
from ymir_adapter.sandbox.tree import Request, Tree, make_tree

TEMPLATES = ROOT / "ymir_adapter/templates"
DOCKERFILE = ROOT / "Dockerfile"
USER = 12345
NEW_MOUNTS = ("unshare", "--mount", "--propagation", "private")
TINY = (
    "--det_token_num 8 --dec_layers 1 --dim_feedforward 64 --reduced_dim 64 --pos_dim 32 "
    "--train_sizes 64 --save_interval 9"
)


# The forms


def template(name: str) -> dict[str, object]:
    return yaml.safe_load((TEMPLATES / f"{name}-template.yaml").read_text())


@pytest.mark.parametrize("name", ["training", "mining", "infer"])
def test_a_template_is_flat_and_every_field_is_explained(name: str):
    values = template(name)
    assert values
    for key, value in values.items():
        assert isinstance(key, str) and len(key) <= 50
        assert isinstance(value, str | int | float) and len(str(value)) <= 100
        if name != "training":
            assert value, f"{key}: the form drops what is zero, false or empty"
    lines = (TEMPLATES / f"{name}-template.yaml").read_text().splitlines()
    fields = [line for line in lines if re.match(r"\w+:", line)]
    assert len(fields) == len(values)
    assert all(re.search(r"  # \w", line) for line in fields)
    injected = {"task_id", "gpu_id", "gpu_count", "class_names", "model_params_path"}
    assert not values.keys() & (injected | {"pretrained_model_params"})
    json.dumps(values)


def test_every_key_of_the_forms_is_understood():
    for_the_platform = {"export_format", "shm_size"}
    assert template("training").keys() == TEMPLATE.keys() | for_the_platform | {"args_options"}
    known = {field.name for field in dataclasses.fields(CandidateSettings)}
    assert template("mining").keys() == known | {"shm_size"}
    assert template("infer").keys() <= known | {"shm_size"}


def test_the_defaults_of_the_forms_are_those_of_the_code(tmp_path: Path):
    """A form as it stands means the same as one with every field cleared."""
    for name in ("mining", "infer"):
        task = read_task(image_task(tmp_path / name, name, {}).env_file)
        assert candidate_settings(task) == CandidateSettings()
    task = read_task(image_task(tmp_path / "training", "training", {}).env_file)
    cleared = {key: value for key, value in task.config.items() if key not in TEMPLATE}
    assert training_settings(task) == training_settings(dataclasses.replace(task, config=cleared))
    assert task.config.keys() > TEMPLATE.keys()


def test_the_manifest_asks_for_detection():
    manifest = yaml.safe_load((TEMPLATES / "manifest.yaml").read_text())
    assert manifest == {"object_type": 2, "enable_livecode": False, "is_official": False}
    assert type(manifest["object_type"]) is int


# The Dockerfile


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def all_of(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def test_the_dockerfile_passes_the_linter(tmp_path: Path):
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("hadolint has no wheel for this kind of machine")
    judged = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert judged.returncode == 0, judged.stdout
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace("WORKDIR /opt/vidt", "WORKDIR opt"))
    assert subprocess.run([linter, wrong], capture_output=True, timeout=60).returncode == 1


def test_the_start_command_is_the_image_s_own():
    assert all_of("ENTRYPOINT") == ["[]"]
    assert json.loads(all_of("CMD")[0]) == ["bash", "/usr/bin/start.sh"]
    assert instructions()[0][0] == "ARG" and all_of("FROM") == ["${BASE_IMAGE}"]
    assert "constraints.txt" in "".join(all_of("RUN"))
    assert not re.search(r"\b(g\+\+|make|nvcc|setup\.py|build-essential)\b", "".join(all_of("RUN")))
    assert "PYTHONUNBUFFERED=1" in all_of("ENV")[0]


def test_the_build_fails_without_a_compiler_or_without_python_s_header(tmp_path: Path):
    """Triton needs both on a GPU, at first use."""
    (check,) = [rest for rest in all_of("RUN") if "Python.h" in rest]
    after = [rest for _, rest in instructions()].index(check)
    assert any("apt-get install" in rest for _, rest in instructions()[:after])
    environment = image_environment()
    assert {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= environment.keys()

    def builds(include: str, *programs: str) -> bool:
        """With a python3 that names this folder of headers, and these programs of this machine."""
        folder = tmp_path / f"bin{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "python3").write_text(f"#!/bin/bash\necho {include}\n")
        (folder / "python3").chmod(0o755)
        for program in programs:
            (folder / program).symlink_to(shutil.which(program) or "missing")
        words = ["/bin/bash", "-o", "pipefail", "-c", check]
        environment = {**os.environ, "PATH": str(folder)}
        done = subprocess.run(words, env=environment, capture_output=True, timeout=60)
        return done.returncode == 0

    headers = tmp_path / "include"
    headers.mkdir()
    assert not builds(str(headers))
    if shutil.which("gcc") is None:
        pytest.skip("this machine has no gcc")
    assert not builds(str(headers), "gcc")
    (headers / "Python.h").write_text("#include <stdlib.h>\n")
    assert builds(str(headers), "gcc")


def test_the_build_gets_what_it_needs_and_no_more(tmp_path: Path):
    """What .dockerignore lets through is what the package's build names."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and all((ROOT / name).exists() for name in kept)
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^include = (\[.*\])", project, re.MULTILINE)
    licences = re.search(r"^license-files = (\[.*\])", project, re.MULTILINE)
    assert packages and licences
    folders = {name.rstrip("*") for name in json.loads(packages[1])}
    named = folders | {*json.loads(licences[1]), "pyproject.toml", "README.md"}
    assert kept == named | {"constraints.txt", "docker"}


# The start command


@dataclass(frozen=True)
class Ended:
    """How a start of the image ended, and what it wrote outside /out and /tmp."""

    code: int
    output: str
    written: list[str]
    isolated: bool


ENTER = r"""
set -e
mount -t tmpfs tmpfs layer
mkdir -p layer/upper/in layer/upper/out layer/work
mount -t overlay overlay -o lowerdir=/,upperdir=layer/upper,workdir=layer/work root
cp -a image/. root/
mount --rbind /proc root/proc
mount --rbind /dev root/dev
mount -t tmpfs -o mode=1777 tmpfs root/tmp
for path in $SEEN; do
    mkdir -p "root$path"
    mount --bind "$path" "root$path"
    mount -o remount,ro,bind "root$path"
    while path=$(dirname "$path"); test "$path" != /; do chmod a+rx "root$path"; done
done
mount --bind in root/in
mount -o remount,ro,bind root/in
mount --bind out root/out
touch stamp
code=0
chroot root setpriv --reuid=$USER_ID --regid=$USER_ID --clear-groups \
    env -i --chdir=/opt/vidt "$@" || code=$?
find layer/upper -newer stamp ! -type d > written
exit $code
"""


@functools.cache
def can_mount() -> bool:
    """Whether this machine lets us make a root folder of our own."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        return False
    script = "mount -t tmpfs t $0 && mkdir $0/u $0/w $0/r && "
    script += "mount -t overlay o -o lowerdir=/,upperdir=$0/u,workdir=$0/w $0/r"
    words = [*NEW_MOUNTS, "bash", "-c", script, "/tmp"]
    return subprocess.run(words, capture_output=True, timeout=60).returncode == 0


def build(image: Path) -> None:
    """What the Dockerfile adds to its base, without the packages that the base of this root, this
    machine, has already.
    """
    for source, target in (rest.split() for rest in all_of("COPY")):
        if target.startswith("/tmp/"):
            continue  # the project itself
        path = image / target[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, path)
    for package in ("vidt", "trainer", "ymir_adapter"):
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, image / "opt/site" / package, ignore=hidden)
    for name, value in image_environment().items():
        if name.endswith("_HOME"):
            (image / value[1:]).mkdir(parents=True)
    subprocess.run(["chmod", "-R", "a+rwX", image / "opt/vidt/cache"], check=True)
    subprocess.run(["chmod", "-R", "a+rX", image], check=True)


def image_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for rest in all_of("ENV") for word in shlex.split(rest))


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """A folder with `image`, what the Dockerfile adds, and room for `in` and `out`."""
    build(tmp_path / "image")
    for name in ("layer", "root"):
        (tmp_path / name).mkdir()
    tmp_path.chmod(0o755)
    yield tmp_path
    shutil.rmtree(tmp_path / "image")


def image_task(root: Path, task: str, settings: dict[str, str], *weights: Path) -> Tree:
    """The platform's folders for a task on a handful of pictures."""
    data = write_coco(root / "data", random_pictures(6, seed=0), random_pictures(3, seed=1))
    tables = {
        split: read_coco(data / f"annotations/instances_{split}2017.json", data / f"{split}2017")[0]
        for split in ("train", "val")
    }
    splits = tables if task == "training" else {"candidate": tables["val"]}
    names = tables["train"].class_names
    request = Request(task, class_names=names, weights=weights, settings=settings)
    return make_tree(root, request, splits)


def start(folder: Path, *command: str, home: str | None = None) -> Ended:
    """Runs the image's CMD, or `command` in its place as `docker run IMAGE COMMAND` does."""
    words = list(command) or json.loads(all_of("CMD")[0])
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    settings = {**image_environment(), "PATH": path, "PYTHONPATH": "/opt/site"}
    settings |= {"OMP_NUM_THREADS": "1"} | ({} if home is None else {"HOME": home})
    isolated = can_mount()
    if isolated:
        relocate(folder)
    before = times(folder / "in")
    ended = (inside if isolated else beside)(folder, words, settings)
    assert times(folder / "in") == before
    names = (folder / "written").read_text().splitlines() if isolated else []
    return Ended(ended.returncode, ended.stdout, names, isolated)


def relocate(folder: Path) -> None:
    """The paths as they are in a container."""
    for path in [folder / "in/env.yaml", folder / "in/config.yaml", *folder.glob("in/*.tsv")]:
        text = path.read_text().replace(str(folder / "in"), "/in")
        path.write_text(text.replace(str(folder / "out"), "/out"))


def times(folder: Path) -> dict[Path, int]:
    """When each file and folder was last changed."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def inside(folder: Path, words: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess:
    """In a root of its own, as a user whom nobody knows."""
    seen = dict.fromkeys((os.path.abspath(sys.prefix), os.path.abspath(sys.base_prefix)))
    pairs = [f"{name}={value}" for name, value in settings.items()]
    return subprocess.run(
        [*NEW_MOUNTS, "bash", "-c", ENTER, "enter", *pairs, *words],
        env={**os.environ, "SEEN": " ".join(seen), "USER_ID": str(USER)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


def beside(folder: Path, words: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess:
    """As this user, in folders that are merely marked read-only."""
    place = {"/usr/bin/start.sh": "image/usr/bin/start.sh", "/img-man": "image/img-man"}
    for container, host in place.items():
        words = [word.replace(container, str(folder / host)) for word in words]
    moved = {
        name: value.replace("/opt/", f"{folder}/image/opt/") for name, value in settings.items()
    }
    folders = [path for path in (folder / "in").rglob("*") if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    try:
        return subprocess.run(
            words,
            env={**moved, "DEFAULT_ENV_FILE_PATH": str(folder / "in/env.yaml")},
            cwd=folder / "image/opt/vidt",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
    finally:
        for path in folders:
            path.chmod(0o755)


def test_this_root_is_as_strict_as_the_platform(image: Path):
    """Else the tests below would show little."""
    if not can_mount():
        pytest.skip("this machine lets us make no root folder: not root, or no mount namespaces")
    image_task(image, "infer", {})
    tries = "id -u; echo home ${HOME-none}; touch /out/new; touch /in/new; touch /opt/site/new"
    ended = start(image, "bash", "-c", tries)
    said = ended.output.splitlines()
    assert said[:2] == [str(USER), "home none"]
    assert "Read-only file system" in said[2] and "Permission denied" in said[3]
    assert (image / "out/new").stat().st_uid == USER
    assert start(image, "touch", "/opt/vidt/cache/new").written == [
        "layer/upper/opt/vidt/cache/new"
    ]


@pytest.mark.slow
def test_training_starts_in_the_image_as_any_user(image: Path):
    form = {"pre_trained": "none", "epochs": "1", "eval_size": "64", "args_options": TINY}
    image_task(image, "training", {**form, "batch_size_per_gpu": "3", "num_workers_per_gpu": "1"})
    ended = start(image)
    assert ended.code == 0, ended.output[-3000:]
    assert ended.written == []
    record = (image / "out/monitor.txt").read_text().split("\t")
    assert record[2:] == ["1.00", "2\n"]
    result = yaml.safe_load((image / "out/models/result.yaml").read_text())
    for name, stage in result["model_stages"].items():
        path = image / "out/models" / name / stage["files"][0]
        assert path.stat().st_size > 0 and path.stat().st_mode & stat.S_IROTH
        assert not ended.isolated or path.stat().st_uid == USER
    assert any(path.stat().st_size for path in (image / "out/tensorboard").rglob("*tfevents*"))


@pytest.mark.slow
def test_a_failure_in_the_image_is_told_in_one_last_line(image: Path):
    weights = image / "foreign.pth"
    weights.write_bytes(b"not weights")
    image_task(image, "infer", {}, weights)
    ended = start(image, home="/")
    last = ended.output.splitlines()[-1]
    assert ended.code == 1 and "foreign.pth" in last and "300004" in last, ended.output[-3000:]
    assert (image / "out/monitor.txt").read_text().split("\t")[3:5] == ["4", "300004"]
    assert ended.written == []


@pytest.mark.parametrize(
    "name", ["manifest", "training-template", "mining-template", "infer-template"]
)
def test_the_platform_can_read_the_forms_out_of_the_image(image: Path, name: str):
    """`docker run IMAGE cat FILE`: nothing but the file may come out."""
    image_task(image, "infer", {})
    ended = start(image, "cat", f"/img-man/{name}.yaml")
    assert ended.code == 0
    assert ended.output == (TEMPLATES / f"{name}.yaml").read_text()
