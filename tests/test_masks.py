"""Instance masks on their way: read from COCO's JSON, kept in the table, augmented with their
pixels, scored as pycocotools scores them, and drawn.
"""

import contextlib
import io
import json
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_runs import cpu, run, settings, tables
from torch import Tensor

from trainer.augmentation.denoising import Denoising
from trainer.augmentation.recipe import Augmentation
from trainer.data.loader import ROWS, DetectionDataset, collate, packed_batch, unpacked
from trainer.data.shapes import write_shapes
from trainer.loop.agreement import Agreement
from trainer.readers.coco import coco_folder, read_coco
from trainer.readers.masks import decode, encode
from trainer.readers.run_lengths import areas_of, as_coco, read_segmentation
from trainer.readers.samples import Sample, SampleTable
from trainer.report.pictures import Comparison, compare
from trainer.scoring.average_precision import COCO_NUMBERS, STATS
from trainer.scoring.evaluation import (
    evaluate,
    run_lengths,
    score_images,
    summarise,
    summarise_masks,
)
from vidt import Predictor
from vidt.images.drawing import class_colour
from vidt.images.preprocessing import Preprocessing
from vidt.losses.mask_vectors import encode_squares, square_masks
from vidt.model.vidt import ViDTConfig, build_detector
from vidt.predict.detections import Detections, MaskVectors

SIZE = (30, 40)
SQUARE = [4, 3, 20, 3, 20, 17, 4, 17]
SIDE, N_KEEP = 28, 100


def rows_of(size: tuple[int, int] = SIZE) -> Tensor:
    """A mask of rows 5..9: bool [1, height, width]."""
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, 5:10] = True
    return mask


def compressed(mask: Tensor) -> dict[str, Any]:
    return {"size": list(mask.shape[1:]), "counts": encode(mask)[0].decode()}


def uncompressed(mask: Tensor) -> dict[str, Any]:
    column = torch.cat([torch.zeros(1), mask[0].T.flatten(), torch.full((1,), 2)])
    ends = column.diff().nonzero().flatten().tolist()
    return {"size": list(mask.shape[1:]), "counts": np.diff([0, *ends]).tolist()}


@pytest.mark.parametrize("form", [compressed, uncompressed])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_run_lengths_of_both_kinds(form: Any, seed: int | None) -> None:
    mask = rows_of()
    if seed is not None:
        mask = torch.from_numpy(np.random.default_rng(seed).random((1, *SIZE)) < 0.3)
        mask[0, 0, 0] = seed == 1
    found = read_segmentation(form(mask), SIZE)
    assert torch.equal(decode([found], SIZE), mask)


@pytest.mark.parametrize(
    "polygons",
    [
        [SQUARE],
        [SQUARE, [25, 20, 38, 20, 30, 28]],
        [[-10, -10, 60, -10, 60, 20, -10, 20]],
        [SQUARE, [1, 2, 3, 4]],
    ],
)
def test_polygons_are_drawn_as_pycocotools_draws_them(polygons: list) -> None:
    whole = [polygon for polygon in polygons if len(polygon) > 4]
    wanted = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(whole, *SIZE)))
    found = decode([read_segmentation(polygons, SIZE)], SIZE)
    assert torch.equal(found[0], torch.from_numpy(wanted).bool())


@pytest.mark.parametrize("nothing", [None, [], {}, [[1, 2, 3, 4]], [[50, 50, 60, 50, 60, 60]]])
def test_nothing_said_is_no_mask(nothing: Any) -> None:
    assert read_segmentation(nothing, SIZE) == b""
    assert not decode([b""], SIZE).any()


@pytest.mark.parametrize(
    "segmentation",
    [
        "polygon",
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, "a", 5, 6]],
        [[1, 2, 3, float("nan"), 5, 6]],
        [[1, 2, [3], 4, 5, 6]],
        [[1, 2, 10**400, 4, 5, 6]],
        SQUARE,
        {"counts": [5, 5], "size": [*SIZE]},
        {"counts": [1205, -5], "size": [*SIZE]},
        {"counts": [10**30], "size": [*SIZE]},
        {"counts": [1200], "size": [40, 30]},
        {"counts": [1200.0], "size": [*SIZE]},
        {"counts": "", "size": [*SIZE]},
        {"counts": "55", "size": [*SIZE]},
        {"counts": "P", "size": [*SIZE]},
        {"counts": "\x01\x7f", "size": [*SIZE]},
        {"counts": "o" * 20 + "0", "size": [*SIZE]},
        {"size": [*SIZE]},
    ],
    ids=str,
)
def test_what_is_malformed_is_refused(segmentation: Any) -> None:
    """pycocotools would crash on some of these and give other memory's contents for others."""
    with pytest.raises(ValueError, match=r"polygon|run lengths|counts"):
        read_segmentation(segmentation, SIZE)


def test_areas_of_any_number_of_masks() -> None:
    entry = as_coco(encode(rows_of())[0], SIZE)
    assert areas_of([entry] * 300) == [float(rows_of().sum())] * 300


def written(folder: Path, segmentations: list[Any], **image: Any) -> tuple[Path, Path]:
    """A COCO file of one picture with these objects."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / "a.png")
    size = {"height": SIZE[0], "width": SIZE[1]}
    row = {"image_id": 1, "category_id": 1, "bbox": [4, 3, 16, 14], "area": 9, "iscrowd": 0}
    document = {
        "images": [{"id": 1, "file_name": "a.png", **size, **image}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {**row, "id": number, "segmentation": each}
            for number, each in enumerate(segmentations, 1)
        ],
    }
    path = folder / "a.json"
    path.write_text(json.dumps(document))
    return path, folder


def test_a_file_of_all_kinds(tmp_path: Path) -> None:
    kinds = [[SQUARE], compressed(rows_of()), uncompressed(rows_of()), [], [[1, 2, 3]]]
    table, findings = read_coco(*written(tmp_path, kinds), masks=True)
    assert table.masks is not None
    assert table.masks.present.tolist() == [True, True, True, False, False]
    masks = decode(table[0].masks or (), SIZE)
    assert masks.flatten(1).sum(1).tolist() == [16 * 14, 200, 200, 0, 0]
    problems = {finding.kind: finding for finding in findings}
    assert (problems["malformed mask"].annotation_id, problems["no mask"].count) == (5, 1)
    without, findings = read_coco(*written(tmp_path, kinds))
    assert without.masks is None and without[0].masks is None and not findings
    unsized, findings = read_coco(*written(tmp_path, kinds[:1], height=None), masks=True)
    assert unsized.masks is None and "size" in findings[0].detail
    assert read_coco(*written(tmp_path, [[], {}]), masks=True)[0].masks is None


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=6, size=96)


@pytest.fixture
def train_set(shapes: Path) -> SampleTable:
    return read_coco(*coco_folder(shapes, "train"), masks=True)[0]


def test_masks_stay_with_their_objects(train_set: SampleTable) -> None:
    again = SampleTable.from_samples(train_set, train_set.class_names)
    assert [sample.masks for sample in again] == [sample.masks for sample in train_set]
    turned = train_set.subset([3, 0, 3])
    assert [sample.masks for sample in turned] == [train_set[i].masks for i in (3, 0, 3)]
    kept = train_set.keep_boxes(train_set.labels == 1)
    for fewer, all_ in zip(kept, train_set, strict=True):
        rows = (all_.labels == 1).nonzero().flatten().tolist()
        assert all_.masks is not None and fewer.masks == tuple(all_.masks[row] for row in rows)
    bare = replace(train_set, masks=None)
    assert bare.fingerprint() != train_set.fingerprint()
    assert train_set.keep_boxes(torch.zeros_like(train_set.crowd))[0].masks == ()
    assert len(ForkingPickler.dumps(train_set)) < 10_000  # a spawned worker is sent no data


SMALL = Augmentation(
    sizes=(96, 128, 160), max_size=200, crop_resize=(100, 120, 150), crop_range=(60, 120)
)


@pytest.mark.parametrize("size", [(120, 200), (260, 90)])
def test_masks_follow_the_pixels(size: tuple[int, int]) -> None:
    """A white ellipse on black, augmented in many ways: the mask is where the white is."""
    y, x = np.mgrid[: size[0], : size[1]]
    centre = size[0] * 0.4, size[1] * 0.6
    white = ((y - centre[0]) / (size[0] * 0.3)) ** 2 + ((x - centre[1]) / (size[1] * 0.2)) ** 2 < 1
    image = Image.fromarray(np.repeat(white[..., None] * np.uint8(255), 3, 2))
    mask = torch.from_numpy(white)[None]
    drawn = [SMALL.draw(size, np.random.default_rng(number)) for number in range(40)]
    assert {geometry.flip for geometry in drawn} == {True, False}
    assert {geometry.crop is None for geometry in drawn} == {True, False}
    for geometry in drawn:
        found = geometry.on_masks(mask)[0]
        pixels = torch.from_numpy(np.asarray(geometry.on_image(image))[..., 0] > 127)
        assert found.shape == geometry.shape == pixels.shape
        assert (found ^ pixels).sum() <= 0.05 * pixels.sum() + 4


def test_targets_of_masks(shapes: Path, tmp_path: Path) -> None:
    train_set, _ = read_coco(*coco_folder(shapes, "train"), masks=True)
    config, _ = settings(shapes, tmp_path, "--train_sizes 96 128")
    augmentation = replace(Augmentation.from_config(config), crop_resize=(96,), crop_range=(40, 70))
    dataset = DetectionDataset(train_set, augmentation, Preprocessing(96), seed=0)
    plain = replace(train_set, masks=None)
    without = DetectionDataset(plain, augmentation, Preprocessing(96), seed=0)
    lost = 0
    for index in range(len(train_set)):
        for epoch in range(4):
            item, bare = dataset[epoch, index], without[epoch, index]
            target = item["target"]
            # Masks change nothing else.
            assert torch.equal(item["image"], bare["image"])
            assert "masks" not in bare["target"]
            for name in ("boxes", "labels"):
                assert torch.equal(target[name], bare["target"][name])
            lost += len(train_set[index].labels) - len(target["labels"])
            height, width = item["image"].shape[1:]
            assert target["masks"].shape == (len(target["labels"]), height, width)
            assert torch.equal(target["has_mask"], target["masks"].flatten(1).any(1))
            boxes = target["mask_boxes"]
            cxcywh = target["boxes"] * torch.tensor([width, height] * 2)
            assert torch.allclose(boxes[:, :2], cxcywh[:, :2] - cxcywh[:, 2:] / 2, atol=1e-3)
            for mask, box in zip(target["masks"], boxes, strict=True):
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                if len(rows):  # the corner of a triangle's box may be all that is left
                    assert box[1] - 3 <= rows.min() and rows.max() < box[3] + 3
                    assert box[0] - 3 <= columns.min() and columns.max() < box[2] + 3
    assert lost > 0
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert [len(t["masks"]) for t in batch["targets"]] == [
        len(t["labels"]) for t in batch["targets"]
    ]


def test_targets_come_out_of_their_parcel_as_they_went_in(train_set: SampleTable) -> None:
    augmentation = Augmentation(sizes=(96, 128), max_size=160, flip=True, crop=False)
    preprocessing = Preprocessing(96)
    dataset = DetectionDataset(
        train_set, augmentation, preprocessing, seed=0, denoising=Denoising(9, num_classes=3)
    )
    items = [dataset[0, index] for index in range(4)]
    items[1]["target"] |= {name: items[1]["target"][name][:0] for name in (*ROWS, "masks")}
    assert len(items[1]["target"]["boxes"]) == 0
    batch, again = collate(items), unpacked(send_to_device(packed_batch(items), "cpu"))
    assert torch.equal(batch.pop("images"), again.pop("images"))
    assert torch.equal(batch.pop("padding"), again.pop("padding"))
    assert batch.keys() == again.keys() == {"targets"}
    for target, other in zip(batch["targets"], again["targets"], strict=True):
        assert target.keys() == other.keys() == {*ROWS, "masks", "image_id"}
        assert target.pop("image_id") == other.pop("image_id")
        assert all(torch.equal(target[name], other[name]) for name in target)


def test_an_object_without_mask_says_so(tmp_path: Path) -> None:
    crowd = {"segmentation": compressed(rows_of())}
    table, _ = read_coco(*written(tmp_path, [[SQUARE], [], crowd["segmentation"]]), masks=True)
    table = replace(table, crowd=torch.tensor([False, False, True]))
    augmentation = Augmentation(sizes=(32,), max_size=64, flip=False, crop=False)
    dataset = DetectionDataset(table, augmentation, Preprocessing(32), seed=0)
    target = dataset[0, 0]["target"]
    assert target["has_mask"].tolist() == [True, False]
    assert target["masks"].flatten(1).any(1).tolist() == [True, False]


def guesses(samples: SampleTable, seed: int) -> dict[int, Detections]:
    """Every object found about where it is, and two things that are not there."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for index, sample in enumerate(samples):
        masks = decode(sample.masks or (), sample.size)
        extra = torch.tensor([[5.0, 5.0, 30.0, 40.0], [-20.0, 50.0, 60.0, 120.0]])
        boxes = torch.cat([sample.boxes, extra])
        vectors = encode_squares(square_masks(masks, sample.boxes, SIDE), N_KEEP)
        vectors = torch.cat([vectors, torch.randn(2, N_KEEP, generator=random)])
        boxes = boxes + torch.randn(boxes.shape, generator=random) * 2
        labels = torch.cat([sample.labels, torch.tensor([0, 1])])
        scores = torch.rand(len(boxes), generator=random)
        order = scores.argsort(descending=True)
        made = Detections(scores, labels, boxes, MaskVectors(vectors, SIDE, sample.size))
        found[index] = made[order]
    return found


def by_pycocotools(json_path: Path, found: dict[int, Detections]) -> dict[str, float]:
    truth = COCO()
    truth.dataset = json.loads(json_path.read_text())
    ids = [category["id"] for category in truth.dataset["categories"]]
    rows = []
    for image, each in zip(truth.dataset["images"], found.values(), strict=True):
        masks = each.masks
        assert masks is not None
        for mask, label, score in zip(
            masks, each.labels.tolist(), each.scores.tolist(), strict=True
        ):
            entry = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            row = {"image_id": image["id"], "category_id": ids[label], "score": score}
            rows.append({**row, "segmentation": entry})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(rows), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(STATS, evaluator.stats.tolist(), strict=True))


def test_the_numbers_are_those_of_pycocotools(shapes: Path) -> None:
    val_set, _ = read_coco(*coco_folder(shapes, "val"), masks=True)
    found = guesses(val_set, seed=0)
    masks = {index: run_lengths(each) for index, each in found.items()}
    indices = list(found)
    halves = [indices[::2], indices[1::2]]  # as two processes share them
    shares = [score_images(val_set, half, found, masks) for half in halves]
    scores = summarise_masks(shares)
    assert list(scores) == [f"segm_{name}" for name in COCO_NUMBERS]
    wanted = by_pycocotools(coco_folder(shapes, "val")[0], found)
    for name, value in wanted.items():
        assert scores[f"segm_{name}"] == pytest.approx(value, abs=1e-9), name
    assert 0.2 < scores["segm_map"] < 0.9
    boxes = summarise(val_set, [score_images(val_set, indices, found)])
    assert abs(boxes["map"] - scores["segm_map"]) > 1e-3


def test_objects_without_masks_neither_help_nor_harm(tmp_path: Path) -> None:
    """Found or not found: the score is that of the others."""
    table, _ = read_coco(*written(tmp_path, [[SQUARE], []]), masks=True)
    boxes = torch.tensor([[4.0, 3.0, 20.0, 17.0], [4.0, 3.0, 20.0, 17.0]])
    masks = {0: [table[0].masks[0]] * 2}  # type: ignore[index]
    found = Detections(torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), boxes)
    share = score_images(table, [0], {0: found}, masks)
    assert summarise_masks([share])["segm_map"] == pytest.approx(1)
    share = score_images(table, [0], {0: found[:1]}, {0: masks[0][:1]})
    assert summarise_masks([share])["segm_map"] == pytest.approx(1)


def test_drawn_in_parts_or_at_once(monkeypatch: pytest.MonkeyPatch, train_set: SampleTable) -> None:
    found = guesses(train_set.subset([0]), seed=1)[0]
    at_once = run_lengths(found)
    monkeypatch.setattr("trainer.scoring.evaluation.MASK_PIXELS", 2 * 96 * 96)
    assert run_lengths(found) == at_once and len(at_once) == len(found.scores)
    assert found.masks is not None
    assert torch.equal(decode(at_once, (96, 96)), found.masks)
    assert as_coco(at_once[0], (96, 96))["size"] == [96, 96]


TINY = {
    "num_classes": 3,
    "det_token_num": 7,
    "reduced_dim": 64,
    "pos_dim": 16,
    "dec_layers": 1,
    "dim_feedforward": 64,
}


@pytest.mark.parametrize("with_vector", [True, False])
def test_masks_are_scored_if_both_sides_have_them(shapes: Path, with_vector: bool) -> None:
    model = build_detector(ViDTConfig(**TINY, with_vector=with_vector, n_keep=9, gt_mask_len=16))
    val_set, _ = read_coco(*coco_folder(shapes, "val"), masks=True)

    def names(samples: SampleTable) -> set[str]:
        settings = {"batch_size": 2, "num_workers": 0}
        found = evaluate(model, samples, Preprocessing(64), cpu(), Agreement(cpu()), **settings)
        assert all(each.mask_vectors is None for each in found.detections.values())
        assert set(found.masks) <= set(found.detections)
        return {name for name in found.metrics if name.startswith("segm_")}

    assert len(names(val_set)) == (12 if with_vector else 0)
    assert names(replace(val_set, masks=None)) == set()


def test_drawn_in_the_colour_of_the_class() -> None:
    image = Image.new("RGB", (480, 480), "#000000")
    masks = torch.zeros(2, 480, 480, dtype=torch.bool)
    masks[0, 100:200, 100:200] = True
    masks[1, 300:400, 300:400] = True
    boxes = torch.tensor([[90.0, 90.0, 210.0, 210.0], [290.0, 290.0, 410.0, 410.0]])
    labels, scores = torch.tensor([0, 1]), torch.tensor([0.9, 0.2])
    drawn_masks, no_crowd = tuple(encode(masks)), torch.zeros(2, dtype=torch.bool)
    size, areas = (image.height, image.width), torch.ones(2)
    sample = Sample("", 1, size, boxes, labels, areas, no_crowd, masks=drawn_masks)
    row = Comparison(image, sample, Detections(scores, labels, boxes), drawn_masks)
    pair = np.asarray(compare(row, ["a", "b"], min_score=0.3, panel=480))
    top = pair.shape[0] - 480
    drawn = pair[top:, :480].astype(np.float32)  # the truth
    for label, place in ((0, 150), (1, 350)):
        colour = np.array([int(class_colour(label)[i : i + 2], 16) for i in (1, 3, 5)])
        assert drawn[place, place] == pytest.approx(0.45 * colour, abs=2)
    assert not drawn[205, 150].any() and not drawn[250, 250].any()
    tinted = [bool(pair[top + y, x].any()) for x in (150, 634) for y in (150,)]
    unsure = [bool(pair[top + 350, x].any()) for x in (350, 834)]
    assert tinted == [True, True] and unsure == [True, False]


def test_a_run_with_masks(shapes: Path, room: Path) -> None:
    flags = "--with_vector --token_label --n_keep 16 --gt_mask_len 16 --epochs 1 --eval_size 96"
    metrics = run(shapes, room, flags)
    assert {f"segm_{name}" for name in COCO_NUMBERS} <= set(metrics)
    assert (room / "predictions.jpg").stat().st_size > 1000
    predictor = Predictor.from_checkpoint(room / "best.safetensors")
    found = predictor([coco_folder(shapes, "val")[1] / "000001.png"])[0][:3]
    assert found.masks is not None and found.masks.shape == (3, 96, 96)


def test_nothing_to_learn_masks_from(tiny_data: Path, tmp_path: Path) -> None:
    config, fields = settings(tiny_data, tmp_path, "--with_vector")
    with pytest.raises(ValueError, match=r"no object has a mask.*--with_vector"):
        tables(config, fields)
    config, fields = settings(tiny_data, tmp_path, "--token_label")
    assert tables(config, fields)[0].masks is None
