"""The shape of the project, read off its files: who may import whom, what has no place in it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Packages may import those before them. Inside a package a file imports only files listed before
# it (`__init__` may import them all, and nobody inside imports the package itself). A file may be
# named here before it exists; one that exists must be named.
_ORDER = {
    "vidt": """
        variants arguments whole_file tracing linear levels images canvas inputs batching drawing
        devices preprocessing deformable_gather deformable_triton deformable_attention mlp dropout
        windows window_attention ram swin coat config epff token_label decoder mask_drawing
        mask_vectors overlap matcher without_neck model criterion distillation coco_classes
        released weights_file published checkpoint pretrained convert predictor onnx_detector
        loading onnx_half onnx_graph onnx_proof coco_map50 export
        """,
    "trainer": """
        wording settings config launch_check findings run_lengths masks samples classes json_stream
        coco_columns coco_file read_coco read_voc read_yolo readers box_check dataset_check shapes
        datasets clock agreement scoring mask_overlap scores mistakes plots report console pictures
        worst_pictures augmentation data optim out_of_memory evaluation loss_log dataset_statistics
        environment run_history page_parts page_curves page_results page_run report_page resume
        start step stopping execution history train flags result_files image_files
        prediction_formats predictions coco_scores command_train command_check command_evaluate
        command_predict command_info command_export command_benchmark command_line
        """,
    "ymir_adapter": """
        errors values environment task monitor outputs columns ark voc coco annotations dataset
        launch training infer mining parts candidates sandbox_tree sandbox __main__
        """,
}
ORDER = {package: files.split() for package, files in _ORDER.items()}
PACKAGES = list(ORDER)
# Words that a package's files, whatever their kind, do not contain in any case of letters.
FOREIGN_WORDS = {"vidt": ("accelerate", "ymir"), "trainer": ("ymir",)}
ROOMS_WITHOUT_A_SUBJECT = {"utils", "util", "misc", "common", "helpers", "helper"}


def source_files(*folders: str) -> list[Path]:
    """Python files of the folders that are there, as paths from the root."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in found]


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.Module, path: Path) -> Iterator[str]:
    """Dotted names of what is imported, at the top or inside a function.

    `from a import b` gives `a.b` where b is a file of a package of ours, else `a`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                is_file = alias.name in ORDER.get(node.module, ())
                yield f"{node.module}.{alias.name}" if is_file else node.module


def calls_of(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    """Calls of `name` or of `anything.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            if called == name or (isinstance(called, ast.Name) and called.id == name):
                yield node


def keywords_of(tree: ast.Module) -> Iterator[tuple[str, object, int]]:
    """Keyword, constant value and line of everything that is passed by keyword as a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg and isinstance(node.value, ast.Constant):
            yield node.arg, node.value.value, node.value.lineno


def has_main_part(tree: ast.Module, path: Path) -> bool:
    tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    return path.name == "__main__.py" or "__name__ == '__main__'" in tests


def import_errors(tree: ast.Module, path: Path) -> list[str]:
    """What a file of a package imports of ours and may not."""
    package, file = path.parts[0], path.stem
    allowed_packages = PACKAGES[: PACKAGES.index(package)]
    order = ORDER[package]
    below = order if file == "__init__" else order[: order.index(file)]
    errors = []
    for name in imports_of(tree, path):
        owner, _, inner = name.partition(".")
        if owner == package and inner.split(".")[0] not in below:
            errors.append(f"{path} imports {name}, which does not stand before it in ORDER")
        elif owner in PACKAGES and owner not in (*allowed_packages, package):
            errors.append(f"{path} imports {name}; {package} may import {allowed_packages} only")
        elif owner == "tests":
            errors.append(f"{path} imports {name}; tests are for tests")
    return errors


FILES = source_files(*PACKAGES)
EVERYTHING = source_files(*PACKAGES, "tests", "benchmarks")
each_file = pytest.mark.parametrize("path", FILES, ids=str)


def test_files_were_found():
    assert {path.parts[0] for path in FILES} >= {"vidt", "trainer"}


@each_file
def test_a_file_has_its_place(path: Path):
    package, *folders, name = path.parts
    hint = f"add {path.stem} to the order of {package} in {Path(__file__).name}, after its imports"
    assert not folders, f"{path}: packages have no packages inside"
    assert name == "__init__.py" or path.stem in ORDER[package], hint


@each_file
def test_imports_go_one_way(path: Path):
    if path.stem != "__init__" and path.stem not in ORDER[path.parts[0]]:
        pytest.fail(f"{path} has no place yet")
    assert import_errors(tree_of(path), path) == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("vidt/model/vidt.py", "import trainer.settings.config"),
        ("vidt/model/vidt.py", "from vidt import ViDT"),
        ("vidt/model/vidt.py", "def f():\n    from vidt.losses.criterion import SetCriterion"),
        ("vidt/losses/matcher.py", "from vidt import criterion"),
        ("trainer/settings/config.py", "from trainer import train"),
        ("trainer/train.py", "from ymir_adapter.protocol.task import Task"),
        ("vidt/__init__.py", "from trainer.settings.config import TrainConfig"),
    ],
)
def test_an_import_the_wrong_way_is_seen(path: str, code: str):
    assert len(import_errors(ast.parse(code), Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("trainer/train.py", "from vidt import ViDT\nfrom trainer.settings.config import parse"),
        ("vidt/losses/criterion.py", "from vidt import matcher"),
        ("vidt/__init__.py", "from vidt.model.vidt import ViDT"),
        ("ymir_adapter/tasks/training.py", "from trainer.train import train\nimport vidt"),
    ],
)
def test_an_import_the_right_way_is_fine(path: str, code: str):
    assert import_errors(ast.parse(code), Path(path)) == []


@pytest.mark.parametrize("package", FOREIGN_WORDS)
def test_a_package_does_not_know_what_is_built_on_it(package: str):
    files = [path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".yaml")]
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8").lower()
        found = [word for word in FOREIGN_WORDS[package] if word in text]
        assert found == [], f"{path.relative_to(ROOT)} mentions {found}"


@pytest.mark.parametrize("path", EVERYTHING, ids=str)
def test_text_is_ascii_and_every_room_has_a_subject(path: Path):
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1):
        assert line.isascii(), f"{path}:{number} is not ASCII: {line}"
    words = set(re.split(r"_+", path.stem.lower()))
    assert not words & ROOMS_WITHOUT_A_SUBJECT, f"{path} is named after no subject"


@each_file
def test_weights_are_loaded_strictly_and_never_unpickled(path: Path):
    tree = tree_of(path)
    modules = {name.split(".")[0] for name in imports_of(tree, path)}
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    forbidden = {("strict", False), ("weights_only", False), ("allow_pickle", True)}
    for keyword, value, line in keywords_of(tree):
        assert (keyword, value) not in forbidden, f"{path}:{line} has {keyword}={value}"
    for call in calls_of(tree, "load"):
        if ast.unparse(call.func) == "torch.load":
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("weights_only") == "True", f"{path}:{call.lineno} may unpickle"


@each_file
def test_only_programs_print(path: Path):
    tree = tree_of(path)
    if not has_main_part(tree, path):
        lines = [call.lineno for call in calls_of(tree, "print")]
        assert lines == [], f"{path} prints in lines {lines}; a library is silent or logs"
