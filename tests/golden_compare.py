"""Comparisons with outputs of the published implementation, for every kind of detector."""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import golden
import torch
from conftest import Compare
from torch import Tensor, nn

from vidt.losses.criterion import SetCriterion, criterion_for, prediction_levels, stacked
from vidt.losses.matcher import Matches, matched_targets
from vidt.losses.softmax_criterion import SoftmaxCriterion
from vidt.model.vidt import build_detector
from vidt.model.without_neck import decode_best_class
from vidt.predict.detections import Detections, decode_top_k
from vidt.weights.released import our_name, released_vidt

# Folders of the golden data that hold results, and the family of each.
FAMILIES = {
    "vidt_swin_nano": "ViDT",
    "vidt_swin_nano_nc3_norefine": "ViDT",
    "vidt_swin_tiny_epff_iou_token_300": "ViDT+",
    "vidt_plus_swin_nano_300": "ViDT+",
    "vidt_coat_lite_tiny": "CoaT",
    "vidt_wo_neck_swin_nano": "no neck",
}
INPUTS = ("pair", "single", "odd")
LOSS_CASES = (*INPUTS, "pair_last_image_empty")


@cache
def load(variant: str) -> nn.Module:
    config = golden.config_of(f"{variant}/meta.json")
    model = build_detector(config)
    model.load_state_dict(released_vidt(golden.weights(variant), config), strict=True)
    return model.eval()


@cache
def run(variant: str, name: str) -> dict:
    """Outputs, and under `inside` the tensors that pass between the parts of the model."""
    model = load(variant)
    with record_inside(model) as inside, torch.no_grad():
        outputs = model(*golden.inputs(name))
    return {**outputs, "inside": inside}


@contextmanager
def record_inside(model: Any) -> Iterator[dict[str, Tensor]]:
    """Fills a dictionary with the model's intermediate tensors under the golden files' names."""
    seen: dict[str, Tensor] = {}
    hooks = [
        stage.register_forward_hook(
            lambda _, __, out, index=index: seen.update(
                {f"stage{index}.patch": out[0].flatten(1, 2), f"stage{index}.det": out[1]}
            )
        )
        for index, stage in enumerate(getattr(model.backbone, "layers", []))  # of Swin alone
    ]

    def body(_: object, __: object, out: tuple) -> None:
        maps, det, det_pos = out
        maps = [*maps, maps[2]][:4]  # without a neck the released body returns the last map twice
        seen.update({f"backbone.feat{level}": feature for level, feature in enumerate(maps)})
        seen["backbone.det_tgt"], seen["backbone.det_pos"] = det.mT, det_pos.mT

    hooks.append(model.backbone.register_forward_hook(body))
    if model.config.method == "vidt":
        hooks += record_decoder(model, seen)
    yield seen
    for hook in hooks:
        hook.remove()


def record_decoder(model: Any, seen: dict[str, Tensor]) -> list[Any]:
    def decoder(_: object, given: tuple, out: tuple) -> None:
        tgt, query_pos, maps, paddings = given[:4]
        seen.update({f"decoder_in.src{level}": source for level, source in enumerate(maps)})
        seen.update({f"decoder_in.mask{level}": mask for level, mask in enumerate(paddings)})
        seen["decoder_in.tgt"], seen["decoder_in.query_pos"] = tgt, query_pos[:1]
        states, boxes = (torch.stack(levels) for levels in out)
        seen["decoder.hs"] = states
        # Without refinement every layer looks from the first reference points.
        start = seen["decoder.init_reference"]
        refined = model.config.with_box_refine
        seen["decoder.inter_references"] = boxes if refined else torch.stack([start] * len(boxes))

    def points(_: object, __: object, out: Tensor) -> None:
        seen["decoder.init_reference"] = out.sigmoid()

    return [
        model.decoder.register_forward_hook(decoder),
        model.decoder.reference_points.register_forward_hook(points),
    ]


def named_outputs(found: dict) -> dict[str, Tensor]:
    """The tensors that `run` returns, under the golden files' names."""
    named = {name: found[name] for name in found if name.startswith("pred_")} | found["inside"]
    for level, logits in enumerate(found.get("enc_tokens", {}).get("pred_logits", [])):
        named[f"enc_tokens{level}"] = logits
    for level, outputs in enumerate(found.get("aux_outputs", [])):
        named |= {f"aux{level}.{name}": tensor for name, tensor in outputs.items()}
    return named


def compare_outputs(variant: str, name: str, compare: Compare) -> None:
    """Compare every stored tensor of a variant on an input, except for decoded predictions."""
    found = named_outputs(run(variant, name))
    meta = golden.read_json(f"{variant}/meta.json")
    stated = {what: 5 * limit for what, limit in meta["fp32_max_abs_diff"][name].items()}
    # Inner tensors have no stated limit: that of the logits, in proportion to their spread.
    relative = stated["pred_logits"] / meta["tensors"][name]["pred_logits"]["std"]
    for what, expected in golden.read_arrays(f"{variant}/{name}.npz").items():
        if what.startswith("post"):
            continue  # see compare_decoded
        facts = meta["tensors"][name][what]
        assert list(found[what].shape) == facts["shape"], what
        if what.endswith("pred_boxes") or "reference" in what:
            allowed = stated["pred_boxes"]
        else:
            allowed = stated.get(what.rpartition(".")[2], relative * facts["std"])
        part = golden.stored_part(found[what], facts["slice"])
        compare(re.sub(r"\d", "", what), part, expected, 0 if "mask" in what else allowed)


def compare_decoded(variant: str, compare: Compare) -> None:
    """Compare scores, labels and boxes in pixels of both images of the pair.

    Masks are compared in test_mask_vectors.
    """
    stored = golden.read_arrays(f"{variant}/pair.npz")
    meta, method = golden.read_json(f"{variant}/meta.json"), load(variant).config.method
    sizes = torch.tensor(meta["postprocess_target_sizes_hw"])
    # From the stored predictions: of nearly equal scores either may come first.
    for image, found in enumerate(decoded(method, stored, sizes)):
        assert torch.equal(found.labels, stored[f"post{image}.labels"])
        compare("scores", found.scores, stored[f"post{image}.scores"], 1e-6)
        compare("boxes in pixels", found.boxes, stored[f"post{image}.boxes"], 1e-3)
    stated = 5 * meta["fp32_max_abs_diff"]["pair"]["pred_logits"]
    for image, found in enumerate(decoded(method, run(variant, "pair"), sizes)):
        compare("scores of ours", found.scores, stored[f"post{image}.scores"], stated)


def decoded(method: str, outputs: dict[str, Tensor], sizes: Tensor) -> list[Detections]:
    """Detections in the order of the golden files, without masks."""
    given = {name: outputs[name].detach() for name in ("pred_logits", "pred_boxes")}
    if method == "vidt":
        return decode_top_k(given, sizes)
    return [Detections(*image) for image in zip(*decode_best_class(given, sizes), strict=True)]


def compare_losses(
    outputs: dict,
    targets: list[dict[str, Tensor]],
    expected: dict,
    compare: Compare,
    allowed: float,
    criterion: SetCriterion | SoftmaxCriterion,
) -> dict[str, Tensor]:
    """Compare every stored loss, their total and the matchings; return our weighted terms."""
    matches = criterion.match(outputs, targets)
    terms = criterion(outputs, targets, max(sum(len(t["labels"]) for t in targets), 1))
    weights = {**criterion.weights, "vector": 1}  # stored with its weight
    plain = {name: term / weights[name.split("_")[1]] for name, term in terms.items()}
    found = plain | log_values(outputs, targets, matches)
    assert found.keys() == expected["losses"].keys()
    for name, value in expected["losses"].items():
        scale = max(value, 1)
        what = re.sub(r"_\d", "", name) + ", relative"
        compare(what, found[name] / scale, torch.tensor(value / scale), allowed)
    total = torch.stack(list(terms.values())).sum() / expected["weighted_total"]
    compare("total, relative", total, torch.tensor(1.0), allowed)
    if "matching_final" in expected:
        wanted = [*expected.get("matching_aux", []), expected["matching_final"]]
        assert [golden.pairs(matches, i, len(targets)) for i in range(len(wanted))] == wanted
    return terms


def compare_case(variant: str, case: str, compare: Compare, allowed: float) -> None:
    """Compare the losses of one of LOSS_CASES."""
    name, config = case.partition("_")[0], load(variant).config
    targets = golden.targets(name, config.num_classes, empty=() if name == case else (1,))
    expected = golden.read_json(f"{variant}/losses.json")[case]
    outputs = run(variant, name)
    compare_losses(outputs, targets, expected, compare, allowed, criterion_for(config))


def compare_gradients(variant: str, compare: Compare, allowed: float = 2e-6) -> None:
    """Compare norms and sums of all gradients with the float64 reference, in float64: float32 is
    off by up to 5e-3, where a sampled place falls into the neighbouring cell.
    """
    facts = golden.read_json(f"{variant}/grads.json")["float64"]
    expected = {gradient_name(name): values for name, values in facts["grads"].items()}
    model = copy.deepcopy(load(variant)).double().train()
    images, padding = golden.inputs("pair")
    outputs = model(images.double(), padding)
    terms = criterion_for(model.config)(outputs, golden.targets("pair", 91), 10)
    torch.stack(list(terms.values())).sum().backward()
    assert expected.pop(None) is None  # where we have no tensor, the reference has no gradient
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient, (norm, total) = parameter.grad.double(), expected[name]
        compare("norm, relative", gradient.norm() / norm, torch.tensor(1.0), allowed)
        # An error of length e * norm changes a sum of n numbers by at most sqrt(n) * e * norm.
        share = (gradient.sum() - total) / (norm * gradient.numel() ** 0.5)
        compare("sum, relative", share, torch.tensor(0.0), allowed)


def gradient_name(name: str) -> str | None:
    """Our name of a gradient; the golden files store heads under a second released name."""
    return our_name(name.replace("transformer.decoder.bbox_embed.", "bbox_embed."))


def compare_criterion(
    case: str, criterion: SetCriterion | SoftmaxCriterion, compare: Compare
) -> None:
    """Compare losses, matchings, gradients and decoded boxes of synthetic predictions."""
    outputs, targets, expected = criterion_case(case)
    terms = compare_losses(outputs, targets, expected, compare, 2e-6, criterion)
    torch.stack(list(terms.values())).sum().backward()
    for name, norm in expected["grad_norms"].items():
        share = outputs[name].grad.norm() / max(norm, 1e-9)
        compare(f"gradient of {name}", share, torch.tensor(float(norm > 0)), 2e-6)
    sizes = torch.tensor(expected["postprocess"]["target_sizes_hw"])
    stored = expected["postprocess"]["results"]
    method = expected["definition"].get("method", "vidt")
    for found, wanted in zip(decoded(method, outputs, sizes), stored, strict=True):
        assert found.labels.tolist() == wanted["labels"]
        compare("scores", found.scores, torch.tensor(wanted["scores"]), 1e-6)
        compare("boxes in pixels", found.boxes, torch.tensor(wanted["boxes"]), 1e-3)


def criterion_case(case: str) -> tuple[dict, list[dict[str, Tensor]], dict]:
    """Outputs that collect gradients, their targets, and the expected results."""
    expected = golden.read_json("criterion_cases.json")[case]
    asked = expected["definition"]
    made = golden.fill().synthetic_outputs(
        asked["tag"],
        2,
        asked["queries"],
        asked["num_classes"] + ("method" in asked),  # without a neck there is a background
        asked["levels"],
        asked.get("n_keep", 0),
        asked.get("iou", False),
        asked.get("token_shapes", ()),
    )
    targets = golden.targets(
        asked["input"], asked["num_classes"], asked["first_label"], asked.get("empty", ())
    )
    outputs = tensors(made)
    if "enc_tokens" in outputs:
        outputs["enc_tokens"]["padding"] = golden.inputs(asked["input"])[1]
    return outputs, targets, expected


def tensors(made: dict) -> dict:
    """Arrays to leaf tensors that collect gradients."""
    levels = [tensors(level) for level in made.pop("aux_outputs", [])]
    tokens = [torch.from_numpy(a) for a in made.pop("enc_tokens", {}).get("pred_logits", [])]
    leaves = {name: torch.from_numpy(array).requires_grad_() for name, array in made.items()}
    leaves |= {"enc_tokens": {"pred_logits": tokens}} if tokens else {}
    return {**leaves, "aux_outputs": levels} if levels else leaves


def check_parameter_count(path: str, model: torch.nn.Module) -> None:
    facts = golden.read_json(path)
    counts = {
        alias or name: (math.prod(shape), gradient_name(name))
        for name, (dtype, shape, alias) in facts["keys"].items()
        if dtype == "float32"
    }
    assert sum(count for count, _ in counts.values()) == facts["parameter_count"]
    used = sum(count for count, ours in counts.values() if ours)
    assert used == sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def log_values(outputs: dict, targets: list, matches: Matches) -> dict[str, Tensor]:
    """Scalars that the released code logs beside its losses, by name.

    `class_error`: per cent of the last level's matched queries whose best class differs from their
    object's, 100 if none is matched. `cardinality_error` of each level: difference between the
    number of objects and the number of queries whose best class is not the last one, mean over
    images. It was made for a softmax with background.
    """
    logits = stacked(prediction_levels(outputs))["pred_logits"]
    best = logits.argmax(-1)  # [L, B, Q]
    labels, _ = matched_targets(matches, targets)
    final = matches.level == len(best) - 1
    right = final & (best[matches.index] == labels)
    counts = torch.tensor([len(target["labels"]) for target in targets])
    counts = counts.to(logits.device, non_blocking=True)
    predicted = (best != logits.shape[-1] - 1).sum(-1)  # [L, B]
    cardinality = (predicted - counts).abs().float().mean(-1)
    values = {"class_error": 100 - 100 * right.sum() / final.sum().clamp(min=1)}
    for level, value in enumerate(cardinality[:-1]):
        values[f"cardinality_error_{level}"] = value
    values["cardinality_error"] = cardinality[-1]
    return values
