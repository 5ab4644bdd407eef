"""Mining whole: what is ranked first, and what must not change a ranking or a result."""

import json
import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import NAMES, ROOT, Learnt, draw, random_pictures, swapped
from torch import Tensor, nn
from ymir_candidates import Results, candidate_task, complaints, run_by_two, run_here
from ymir_runs import CHECKER

from vidt.images.preprocessing import Preprocessing
from vidt.model.vidt import ViDT, ViDTConfig
from vidt.predict.predictor import Predictor
from vidt.weights.weights_file import WeightsInfo, load_weights, save_weights
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.task import candidate_settings, read_task
from ymir_adapter.tasks.candidates import CandidatePass, make_detector
from ymir_adapter.tasks.mining import FLOORS
from ymir_adapter.tasks.parts import Part, Parts

ALGORITHMS = tuple(FLOORS)
CALD = pytest.param("cald", marks=pytest.mark.slow)  # five rows for each picture
CALD_IS_SLOW = [CALD if name == "cald" else name for name in ALGORITHMS]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sixteen pictures of four sizes, and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for index, picture in enumerate([*random_pictures(4, 0), *random_pictures(12, 3)]):
        paths.append(folder / f"{index:02d}.png")
        draw(picture, 101 + index).save(paths[-1])
    broken = folder / "broken.jpg"
    broken.write_bytes(b"no picture")
    return [*paths[:5], broken, *paths[5:]]


class Tones(nn.Module):
    """A detector whose doubts are known: it frames what is coloured, and each class scores by the
    share of its colour in there. Its two inner levels look at the left and the right half only.

    So it is sure of an object of one colour, and torn by one that is half red and half green.
    """

    config = ViDTConfig(num_classes=3)

    def forward(self, images: Tensor, padding: Tensor, detections_only: bool) -> dict:
        preprocessing = Preprocessing()
        mean, std = (torch.tensor(each) for each in (preprocessing.mean, preprocessing.std))
        pixels = images * std[:, None, None] + mean[:, None, None]
        found = [self.look(each) for each in pixels]
        levels = [
            torch.stack(level) for level in zip(*(logits for logits, _ in found), strict=True)
        ]
        boxes = torch.stack([box for _, box in found])
        left, right, whole = ({"pred_logits": level, "pred_boxes": boxes} for level in levels)
        return {**whole, "aux_outputs": [left, right]}

    @staticmethod
    def look(pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        coloured = pixels.amax(0) - pixels.amin(0) > 0.2
        y, x = coloured.nonzero().unbind(1)
        height, width = coloured.shape
        edges = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        x1, y1, x2, y2 = (edges / torch.tensor([width, height] * 2)).tolist()
        box = torch.tensor([[(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], [0.1] * 4])
        tone = pixels[:, y, x].argmax(0)  # of each coloured pixel: red, green or blue
        middle = (x1 + x2) / 2 * width
        logits = []
        for some in (tone[x < middle], tone[x >= middle], tone):
            share = torch.bincount(some, minlength=3) / len(some)
            scores = 0.02 + 0.96 * share
            nothing = torch.full_like(scores, 0.02)
            logits.append(torch.stack([scores, nothing]).logit())
        return logits, box


def tones() -> Predictor:
    info = WeightsInfo(Tones.config, NAMES, Preprocessing(eval_size=96))
    return Predictor(Tones(), info)  # type: ignore[arg-type]


def write_object(path: Path, left: int, right: int, seed: int) -> Path:
    """An object whose halves have these colours, somewhere on grey."""
    random = np.random.default_rng(seed)
    pixels = random.integers(110, 130, (96, 96, 3)).astype(np.uint8)
    y, x = random.integers(24, 36, 2)
    height, width = random.integers(20, 30, 2) // 2 * 2
    pixels[y : y + height, x : x + width] = 40
    pixels[y : y + height, x : x + width // 2, left] = 220
    pixels[y : y + height, x + width // 2 : x + width, right] = 220
    Image.fromarray(pixels).save(path)
    return path


def ranked_by_tones(root: Path, paths: Sequence[Path], **config: object) -> list[str]:
    tree = candidate_task(root, paths, root / "no weights", mining=True, **config)
    task = read_task(tree.env_file)
    settings, assets = candidate_settings(task), [str(path) for path in paths]
    detector = make_detector(settings.mining_algorithm, settings, tones())
    candidate_pass = CandidatePass(task, settings, assets, detector)
    with Part(tree.output, 0) as part:
        candidate_pass.run(range(len(assets)), part)
    with Parts(tree.output, len(assets), 1) as parts:
        candidate_pass.write_results(parts)
    return [name for name, _ in Results(tree).ranking or []]


@pytest.mark.parametrize("algorithm", ["entropy", "cald", "aldd"])
def test_images_that_the_detector_is_unsure_of_come_first(algorithm: str, tmp_path: Path) -> None:
    """Ten of thirty: objects of two colours, spread among ones of one colour."""
    paths = []
    for index in range(30):
        left = index % 3
        right = (left + 1) % 3 if index % 3 == 1 else left
        name = f"{index:02d}-{'torn' if left != right else 'sure'}.png"
        paths.append(write_object(tmp_path / name, left, right, index))
    ranked = ranked_by_tones(tmp_path / "task", paths, mining_algorithm=algorithm)
    assert [name.endswith("torn.png") for name in ranked] == [True] * 10 + [False] * 20


def test_class_balance_prefers_rare_classes(tmp_path: Path) -> None:
    """All are sure alike; one of ten is of another class."""
    paths = [
        write_object(tmp_path / f"{index}.png", *[2 if index == 6 else 0] * 2, index)
        for index in range(10)
    ]
    plain = ranked_by_tones(tmp_path / "plain", paths)
    assert plain == [path.name for path in paths]
    balanced = ranked_by_tones(tmp_path / "balanced", paths, class_balance="yes")
    assert balanced == ["6.png", *(name for name in plain if name != "6.png")]


@pytest.mark.parametrize("algorithm", ["entropy", "cald"])
def test_class_distribution_prefers_classes_with_weight(algorithm: str, tmp_path: Path) -> None:
    """Objects of one class in turn red, green, blue; red counts twice as much as green, blue not at
    all: its pictures have the lowest score.
    """
    paths = [write_object(tmp_path / f"{i}.png", i % 3, i % 3, seed=i // 3) for i in range(9)]
    form = {"mining_algorithm": algorithm, "class_distribution": "2,1,0"}
    ranked = ranked_by_tones(tmp_path / "task", paths, **form)
    assert [int(name[0]) % 3 for name in ranked[-3:]] == [2, 2, 2]
    assert [int(name[0]) % 3 for name in ranked[:6]] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("algorithm", ["entropy", "cald", "aldd"])
def test_pictures_without_boxes_are_ranked_by_their_best_queries(
    algorithm: str, learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    """At this threshold no picture has a box, as with a weak model; one of them is black."""
    black = tmp_path / "black.png"
    Image.new("RGB", (64, 64)).save(black)
    paths = [black, *(path for path in images if path.suffix == ".png")]
    form = {"mining_algorithm": algorithm, "conf_threshold": 1.0}
    tree = candidate_task(tmp_path / "task", paths, learnt.weights, mining=True, **form)  # type: ignore[arg-type]
    names, scores = zip(*run_here(tree).ranking or [], strict=True)
    assert len(set(scores)) >= len(paths) - 3  # of four decimals some may be equal
    assert names != tuple(path.name for path in paths) and names[0] != "black.png"
    assert FLOORS[algorithm] <= min(scores) and max(scores) < FLOORS[algorithm] + 1.3


@pytest.mark.parametrize("algorithm", CALD_IS_SLOW)
def test_batch_size_workers_and_order_do_not_matter(
    algorithm: str, learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    def ranked(name: str, paths: list[Path], **config: object) -> list[tuple[str, float]]:
        tree = candidate_task(
            tmp_path / name,
            paths,
            learnt.weights,
            mining=True,
            mining_algorithm=algorithm,
            class_balance=True,
            **config,
        )
        return run_here(tree).ranking or []

    expected = ranked("one", images, batch_size_per_gpu=1)
    assert len(expected) == len(images) and len({score for _, score in expected}) == len(images)
    assert expected[-1] == ("broken.jpg", FLOORS[algorithm] - 1)
    assert ranked("eight", images, batch_size_per_gpu=8, num_workers_per_gpu=2) == expected
    shuffled = [images[index] for index in np.random.default_rng(0).permutation(len(images))]
    assert ranked("shuffled", shuffled, batch_size_per_gpu=3) == expected
    assert ranked("reversed", images[::-1]) == expected


def test_ties_stay_in_the_order_of_the_index(
    learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    """The same picture under several names."""
    copies = [tmp_path / f"{name}.png" for name in "dbca"]
    for path in copies:
        path.write_bytes(images[0].read_bytes())
    results = run_here(candidate_task(tmp_path / "task", copies, learnt.weights, mining=True))
    assert [name for name, _ in results.ranking or []] == [path.name for path in copies]
    assert len(set(results.scores.values())) == 1


@pytest.mark.parametrize("algorithm", ["random", CALD])
def test_seeds_matter_where_there_is_chance(
    algorithm: str, learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    first, second = (
        run_here(
            candidate_task(
                tmp_path / str(seed),
                images,
                learnt.weights,
                mining=True,
                mining_algorithm=algorithm,
                seed=seed,
            )
        ).scores
        for seed in (1, 2)
    )
    assert first != second and first.keys() == second.keys()


@pytest.mark.parametrize("algorithm", CALD_IS_SLOW)
def test_one_pass_serves_mining_and_inference(
    algorithm: str, learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    forward, passes = ViDT.forward, []

    def counted(self, batch, *rest, **more):
        passes.append(len(batch))
        return forward(self, batch, *rest, **more)

    def run(name: str, **asked: bool) -> tuple[Results, int]:
        passes.clear()
        more = {"mining_algorithm": algorithm, **asked}
        tree = candidate_task(tmp_path / name, images, learnt.weights, **more)  # type: ignore[arg-type]
        return run_here(tree), sum(passes)

    with swapped(ViDT, "forward", counted):
        mined, mining = run("mining", mining=True)
        inferred, inference = run("infer", infer=True)
        both, shared = run("both", mining=True, infer=True)
    readable = len(images) - 1
    assert inference == readable
    assert mining == {"random": 0, "cald": 5 * readable}.get(algorithm, readable)
    assert shared == max(mining, inference)
    assert both.ranking == mined.ranking and inferred.ranking is mined.boxes is None
    assert both.boxes is not None and inferred.boxes is not None
    for name, boxes in inferred.boxes.items():
        assert [box["box"] for box in boxes] == [box["box"] for box in both.boxes[name]]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    """Each algorithm, with inference beside it; the file that cannot be read is with either."""
    configs = {name: {"mining_algorithm": name, "class_balance": True} for name in ALGORITHMS}
    configs["cald"] |= {"num_workers_per_gpu": 2, "batch_size_per_gpu": 16}
    trees = {
        (name, ranks): candidate_task(
            tmp_path / f"{name}-{ranks}", images, learnt.weights, mining=True, infer=True, **config
        )
        for name, config in configs.items()
        for ranks in (1, 2)
    }
    said = run_by_two(*(trees[name, 2] for name in configs))
    assert "1 of 17 candidates cannot be read" in said and "broken.jpg" in said
    for name in configs:
        one, two = run_here(trees[name, 1]), Results(trees[name, 2])
        assert one.ranking == two.ranking
        assert list(one.boxes or {}) == [path.name for path in images]
        for file in ("result.tsv", "infer-result.json"):
            bytes_of = [(each.tree.output / file).read_bytes() for each in (one, two)]
            assert bytes_of[0] == bytes_of[1], (name, file)
    tree = trees["cald", 2]
    left = {path.name for path in tree.output.iterdir()}
    assert left == {"monitor.txt", "result.tsv", "infer-result.json"}
    assert tree.record[2:4] == ["1.00", "2"]
    if CHECKER.exists():
        assert complaints(tree, "mining+infer") == ""


def test_aldd_needs_inner_layers_that_were_taught(
    learnt: Learnt, images: list[Path], tmp_path: Path
) -> None:
    _, info = load_weights(learnt.weights)
    config = ViDTConfig(**{**vars(info.config), "aux_loss": False})
    weights = tmp_path / "last.safetensors"
    untaught = WeightsInfo(config, info.class_names, info.preprocessing)
    save_weights(weights, ViDT(config).state_dict(), untaught)
    more = {"mining": True, "mining_algorithm": "aldd"}
    tree = candidate_task(tmp_path / "task", images, weights, **more)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="aldd, which compares") as caught:
        run_here(tree)
    assert caught.value.code == Code.CONFIG


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_foreign_weights_are_refused_whether_they_are_needed_or_not(
    algorithm: str, images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "foreign.safetensors").write_bytes(b"not ours")
    more = {"mining": True, "mining_algorithm": algorithm}
    weights = tmp_path / "foreign.safetensors"
    tree = candidate_task(tmp_path / "task", images, weights, **more)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"foreign\.safetensors") as caught:
        run_here(tree)
    assert caught.value.code == Code.MODEL


@pytest.mark.slow
def test_the_benchmark_measures_each_kind_of_work(
    learnt: Learnt,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder, written = tmp_path / "images", tmp_path / "speed.json"
    folder.mkdir()
    for path in images[:3]:
        (folder / path.name).symlink_to(path)
    flags = ["--weights", learnt.weights, "--images", folder, "--json", written]
    sizes = ["--count", 4, "--turns", 1, "--threads", 1, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["candidates.py", *map(str, [*flags, *sizes])])
    runpy.run_path(str(ROOT / "benchmarks/candidates.py"), run_name="__main__")
    printed = capsys.readouterr().out
    results = json.loads(written.read_text())["results"]
    assert [result["work"] for result in results] == ["infer", "entropy", "aldd", "cald"]
    for result in results:
        assert result["ratio"] == pytest.approx(result["ours"] / result["alone"])
        assert f"{result['ours']:.2f}" in printed
