"""The shape of the project, read off its files: who may import whom, what has no place in it."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A package imports packages named before it; inside a package, a room (a folder, or a file beside
# the folders) imports rooms named before it. `__init__` may import every room of its package.
ROOMS = {
    "vidt": "errors atomic arguments downloads ops images model losses weights convert predict "
    "onnx loading",
    "trainer": "settings readers augmentation data backward loop scoring report evaluate_and_save "
    "train from_python commands",
    "ymir_adapter": "protocol dataset launch tasks sandbox __main__",
}
# People look for `vidt.train`, which imports the trainer when it is used, not before.
UPWARD = {("vidt/__init__.py", "trainer.from_python")}
MOST_ROOMS, MOST_FILES = 9, 12  # of a package, in a room
PACKAGES = list(ROOMS)
# Words that a package's files, whatever their kind, do not contain in any case of letters.
FOREIGN_WORDS = {"vidt": ("accelerate", "ymir"), "trainer": ("ymir",)}
NO_SUBJECT = {"utils", "util", "misc", "common", "helpers", "helper"}
# `accelerate launch trainer/train.py` puts `trainer/` first on the import path. Packages that
# ours import if they are installed, and that need not be installed here.
OPTIONAL_IMPORTS = {
    "datasets",
    "evaluate",
    "tokenizers",
    "transformers",
    "peft",
    "deepspeed",
    "wandb",
}


def source_files(*folders: str) -> list[Path]:
    """Python files of the folders, as paths from the root."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in found]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.Module, path: Path) -> Iterator[str]:
    """Dotted names of what is imported, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno} imports relatively"
            if node.module in PACKAGES:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def calls_of(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    """Calls of `name` or of `anything.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            if called == name or (isinstance(called, ast.Name) and called.id == name):
                yield node


def import_errors(tree: ast.Module, path: Path) -> list[str]:
    """Imports of a file that run against the order of rooms and packages."""
    package, room = path.parts[0], Path(path.parts[1]).stem
    order = ROOMS[package].split()
    reachable = order if room == "__init__" else order[: order.index(room) + 1]
    errors = []
    for name in imports_of(tree, path):
        owner, _, inner = name.partition(".")
        if owner == package and inner.split(".")[0] not in reachable:
            errors.append(f"{path} imports {name}, which is not in a room before {room}")
        elif (path.as_posix(), name) in UPWARD:
            continue
        elif owner in PACKAGES and PACKAGES.index(owner) > PACKAGES.index(package):
            errors.append(f"{path} imports {name}: {package} stands before {owner}")
        elif owner == "tests":
            errors.append(f"{path} imports {name}; tests are for tests")
    return errors


FILES = source_files(*PACKAGES)


def test_every_file_is_in_a_room():
    for path in FILES:
        room = Path(path.parts[1]).stem
        known = [*ROOMS[path.parts[0]].split(), "__init__"]
        assert room in known, f"{path}: name {room} in ROOMS, after what it imports"
        assert len(path.parts) <= 3, f"{path}: rooms have no rooms inside"


def test_rooms_are_few_small_and_described():
    for package in PACKAGES:
        rooms = [path for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()]
        assert 1 < len(rooms) <= MOST_ROOMS, package
        for room in rooms:
            files = [path for path in room.glob("*.py") if path.name != "__init__.py"]
            assert 1 < len(files) <= MOST_FILES, room
            assert ast.get_docstring(tree_of(room / "__init__.py")), f"{room}: what lives there?"


def test_imports_go_one_way():
    assert [error for path in FILES for error in import_errors(tree_of(path), path)] == []


def test_imports_make_no_circle():
    modules = {".".join(path.with_suffix("").parts): path for path in FILES}
    imported = {
        name: {other for other in imports_of(tree_of(path), path) if other in modules}
        for name, path in modules.items()
    }
    while free := {name for name, others in imported.items() if not others}:
        imported = {name: others - free for name, others in imported.items() if name not in free}
    assert imported == {}


@pytest.mark.parametrize(
    ("path", "code", "wrong"),
    [
        ("vidt/model/vidt.py", "import trainer.train", True),
        ("vidt/model/vidt.py", "from vidt import ViDT", True),
        (
            "vidt/model/vidt.py",
            "def f():\n    from vidt.losses.criterion import SetCriterion",
            True,
        ),
        ("trainer/train.py", "from ymir_adapter.protocol.task import Task", True),
        ("vidt/__init__.py", "from trainer.settings.config import TrainConfig", True),
        ("vidt/__init__.py", "from trainer.from_python import train", False),
        ("vidt/loading.py", "from trainer.from_python import train", True),
        ("trainer/train.py", "from vidt.model.vidt import ViDT\nimport vidt", False),
        ("vidt/losses/criterion.py", "from vidt.model.vidt import ViDT", False),
        ("vidt/__init__.py", "from vidt.model.vidt import ViDT", False),
    ],
)
def test_an_import_the_wrong_way_is_seen(path: str, code: str, wrong: bool):
    assert bool(import_errors(ast.parse(code), Path(path))) == wrong


def test_no_file_beside_the_script_shadows_a_package():
    installed = {name.lower() for name in packages_distributions()} - set(PACKAGES) - {"tests"}
    taken = installed | OPTIONAL_IMPORTS | set(sys.stdlib_module_names)
    names = {path.stem for path in (ROOT / "trainer").iterdir() if path.suffix in ("", ".py")}
    assert {"train", "data"} <= names
    assert names & taken - {"__init__", "__pycache__"} == set()


@pytest.mark.parametrize("package", FOREIGN_WORDS)
def test_a_package_does_not_know_what_is_built_on_it(package: str):
    files = [path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".yaml")]
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8").lower()
        found = [word for word in FOREIGN_WORDS[package] if word in text]
        assert found == [], f"{path.relative_to(ROOT)} mentions {found}"


def test_text_is_ascii_and_every_file_has_a_subject():
    for path in source_files(*PACKAGES, "tests", "benchmarks"):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        odd = [number for number, line in enumerate(lines, start=1) if not line.isascii()]
        assert odd == [], f"{path} has lines that are not ASCII"
        words = set(re.split(r"_+", path.stem.lower()))
        assert not words & NO_SUBJECT, f"{path} is named after no subject"


def test_public_classes_have_names_of_their_own():
    owners: dict[str, Path] = {}
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in owners, f"{node.name}: {path} and {owners[node.name]}"
                owners[node.name] = path


def test_weights_are_loaded_strictly_and_never_unpickled():
    forbidden = {("strict", False), ("weights_only", False), ("allow_pickle", True)}
    for path in FILES:
        tree = tree_of(path)
        modules = {name.split(".")[0] for name in imports_of(tree, path)}
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
                assert (node.arg, node.value.value) not in forbidden, f"{path}:{node.value.lineno}"
        for call in calls_of(tree, "load"):
            if ast.unparse(call.func) == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert given.get("weights_only") == "True", f"{path}:{call.lineno} may unpickle"


def test_only_programs_print():
    for path in FILES:
        tree = tree_of(path)
        tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
        if path.name != "__main__.py" and "__name__ == '__main__'" not in tests:
            lines = [call.lineno for call in calls_of(tree, "print")]
            assert lines == [], f"{path} prints in lines {lines}; a library is silent or logs"
