"""A training step waits for the device once per micro-batch, in the matcher, and nowhere else; a
prediction once per batch, for all that was found.

Without a GPU the step runs on PyTorch's `meta` device, whose tensors have no data: reading one on
the host, or a shape that depends on one, is an error there, and what is copied from device to
device is counted. Some operations of PyTorch's own read values except on `meta`, so a step on the
CPU counts those. On a GPU its own account is asked.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import blurred, cpu
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.backward.gradient_sum import GradientSum
from trainer.backward.gradients import gradients
from trainer.loop.agreement import Agreement
from trainer.loop.loss_log import LossLog
from trainer.loop.optim import make_ema, make_optimizer
from trainer.loop.step import agree_on
from trainer.scoring.evaluation import predict_batches
from trainer.settings.config import TrainConfig
from vidt.images.preprocessing import Preprocessing
from vidt.losses.criterion import criterion_for
from vidt.losses.distillation import TokenMatching
from vidt.model.config import ViDTConfig
from vidt.model.vidt import build_detector
from vidt.predict.predictor import Predictor
from vidt.weights.weights_file import WeightsInfo

DEVICE = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
READERS = ["_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"]
PARTS = {
    "vidt": {},
    "vidt+": {
        "epff": True,
        "iou_aware": True,
        "token_label": True,
        "with_vector": True,
        "gt_mask_len": 16,
    },
    "extra queries": {"query_groups": 3, "label_embedding": True},
    "without neck": {"method": "vidt_wo_neck"},
}


class Waits(TorchDispatchMode):
    """What the host would wait for, in the order of events, if `meta` were a device with a queue.

    What is brought to the host comes as zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # inference mode hands over what is made of others in one piece
            whole = op.decompose(*args, **kwargs)
        if whole is not NotImplemented:
            return whole
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if op in COPIES:
            source = args[-1] if op is COPIES[0] else args[1]
            to = kwargs.get("device", source.device) if op is COPIES[0] else args[0].device
            if source.is_meta and torch.device(to).type == "cpu":
                self.seen.append("brought to the host")
                source = torch.zeros(source.shape, dtype=source.dtype)
                return source if op is COPIES[0] else args[0].copy_(source)
            if source.device.type == "cpu" and torch.device(to).type == "meta":
                blocking = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
                self.seen += ["taken to the device, waiting"] * blocking
        elif {"meta", "cpu"} <= {tensor.device.type for tensor in tensors if tensor.ndim}:
            self.seen.append(f"{op} of tensors on both sides")
        return op(*args, **kwargs)


class Reads(TorchDispatchMode):
    """What would be read from a device, or has a shape that depends on what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        aten = torch.ops.aten
        picks = op in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
        by_mask = picks and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or op.overloadpacket.__name__ in READERS:
            self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


class Literals(TorchFunctionMode):
    """Tensors made on the device from numbers of Python: each is taken there, waiting."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        makers = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        if function in makers and made.is_meta and not isinstance(args[-1], Tensor):
            self.seen.append("a tensor of numbers")
        return made


def waits(work: Callable[[], object]) -> list[str]:
    """Of work on tensors of `DEVICE`."""
    with Waits() as mode, Literals(mode.seen):
        work()
    return mode.seen


def micro_batch(config: ViDTConfig, device: torch.device) -> dict[str, Any]:
    """Three images of different sizes, as the loader gives them: with three objects, one and none,
    and masks for two.
    """
    targets = []
    for objects, (height, width) in zip((3, 1, 0), ((64, 48), (32, 64), (64, 64)), strict=True):
        boxes = torch.rand(objects, 4, device=device) * 0.3 + 0.2
        target = {
            "labels": torch.randint(3, (objects,), device=device),
            "boxes": boxes,
            "image_id": objects,
        }
        if config.with_box_refine and config.method == "vidt":
            target["denoising_boxes"] = boxes.repeat(2, 1)
            target["denoising_labels"] = target["labels"].repeat(2)
        if config.with_vector:
            masks = torch.rand(objects, height, width, device=device) > 0.5
            known = torch.ones(objects, dtype=torch.bool, device=device)
            target |= {"masks": masks, "mask_boxes": boxes * 32, "has_mask": known}
        targets.append(target)
    padding = torch.zeros(3, 64, 64, dtype=torch.bool, device=device)
    images = torch.randn(3, 3, 64, 64, device=device)
    return {"images": images, "padding": padding, "targets": targets}


def step_of(config: ViDTConfig, device: torch.device, tmp_path: Any) -> Callable[..., object]:
    """An optimiser step of two micro-batches as `trainer.train` makes it, on a canvas that is so
    many pixels higher than its images; the optimiser itself, for which `meta` has no kernel, takes
    part on other devices.
    """
    accelerator, options = cpu(), TrainConfig(output_dir=str(tmp_path))
    agreement = Agreement(accelerator)
    model = blurred(build_detector(config)).train()
    ema, criterion = make_ema(model, 0.9).to(device), criterion_for(config)
    model = model.to(device)
    teacher = None
    if config.method == "vidt":
        teacher = TokenMatching(build_detector(config).to(device))
    parameters = list(model.parameters())
    gradient_sum = GradientSum(parameters, accelerator.num_processes)
    optimizer = None if device.type == "meta" else make_optimizer(model, options)
    log = LossLog(agreement, tmp_path, step_images=6)
    window = [micro_batch(config, device) for _ in range(2)]

    num_boxes, (height, width), *_ = agree_on(window, 0, agreement)

    def step(larger: int = 16) -> None:
        canvas = (height + larger, width)  # another process has a larger image
        terms = gradients(
            model,
            criterion,
            accelerator,
            window,
            canvas,
            num_boxes,
            teacher,
            gradient_sum=gradient_sum,
        )
        assert terms is not None
        norm = accelerator.clip_grad_norm_(parameters, 0.1)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(model, step=5)
        log.add(0, terms, norm, [1, 2])

    return step


def configuration(tiny: ViDTConfig, parts: dict[str, Any]) -> ViDTConfig:
    return ViDTConfig(**{**vars(tiny), "backbone_name": "swin_test", **parts})


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_step_waits_for_the_matchers_costs_alone(
    parts: dict[str, Any], tiny_config: ViDTConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What heads switch off for their device; PyTorch knows no autocast of this one.
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    step = step_of(configuration(tiny_config, parts), DEVICE, tmp_path)
    waits(step)  # what begins with the first step
    for larger in (16, 0, 48, 80):  # three of four canvases are new
        assert waits(lambda larger=larger: step(larger)) == ["brought to the host"] * 2


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_step_reads_nothing(
    parts: dict[str, Any], tiny_config: ViDTConfig, tmp_path: Any
) -> None:
    """On the CPU, where what the matcher brings to the host is there already, at a canvas seen
    before and at a new one.
    """
    step = step_of(configuration(tiny_config, parts), torch.device("cpu"), tmp_path)
    step()
    with Reads() as mode:
        step()
        step(larger=48)
    assert mode.seen == []


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_prediction_waits_for_what_was_found_alone(
    parts: dict[str, Any], tiny_config: ViDTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each batch. Every batch has a new canvas, and the next one is on its way to the
    device before the host waits for this one.
    """
    monkeypatch.setattr(torch, "autocast", lambda *given, **how: contextlib.nullcontext())
    config = configuration(tiny_config, parts)
    info = WeightsInfo(config, ("disc", "square", "star"), Preprocessing(64))
    predictor = Predictor(build_detector(config), info, device=DEVICE)
    pictures = [np.zeros((64, width, 3), np.uint8) for width in (80, 80, 100, 100, 120, 120)]
    predictor.preprocessing.normalise(torch.zeros(1, 3, 8, 8, device=DEVICE))  # constants go there
    assert waits(lambda: predictor(pictures, batch_size=2)) == ["brought to the host"] * 3


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_an_evaluation_waits_for_what_was_found_alone(
    parts: dict[str, Any], tiny_config: ViDTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *given, **how: contextlib.nullcontext())
    accelerator = cpu()
    monkeypatch.setattr(type(accelerator), "device", DEVICE)
    model = build_detector(configuration(tiny_config, parts)).to(DEVICE)
    batches = [
        ([2 * number, 2 * number + 1], pixels.to(torch.uint8), pixels[:, 0] > 0)
        for number, pixels in enumerate(torch.zeros(2, 3, 64, width) for width in (64, 96, 128))
    ]
    sizes, preprocessing = torch.full((6, 2), 64), Preprocessing(64)

    def work() -> None:
        found = list(predict_batches(model, batches, sizes, preprocessing, accelerator))
        assert [list(each) for each in found] == [[0, 1], [2, 3], [4, 5]]

    preprocessing.normalise(torch.zeros(1, 3, 8, 8, device=DEVICE))  # constants go there
    assert waits(work) == ["brought to the host"] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's own account needs a GPU")
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_gpu_agrees(parts: dict[str, Any], tiny_config: ViDTConfig, tmp_path: Any) -> None:
    step = step_of(configuration(tiny_config, parts), torch.device("cuda"), tmp_path)
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(larger=48)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    said = [str(warning.message) for warning in caught]
    assert len([text for text in said if "synchroniz" in text]) == 2, said


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda tensor: tensor.cpu(), "brought to the host"),
        (lambda tensor: tensor.tolist(), "brought to the host"),
        (lambda tensor: torch.zeros(2, 3).copy_(tensor), "brought to the host"),
        (lambda tensor: torch.zeros(2, 3).to(DEVICE), "taken to the device, waiting"),
        (lambda tensor: tensor.copy_(torch.zeros(2, 3)), "taken to the device, waiting"),
        (lambda tensor: tensor.new_tensor([1.0, 2.0]), "a tensor of numbers"),
        (lambda tensor: torch.tensor([1.0], device=DEVICE), "a tensor of numbers"),
        (lambda tensor: tensor[torch.tensor([1, 0])], "both sides"),
    ],
)
def test_a_wait_is_counted(work: Callable[[Tensor], object], found: str) -> None:
    seen = waits(lambda: work(torch.zeros(2, 3, device=DEVICE)))
    assert len(seen) == 1 and found in seen[0]


@pytest.mark.parametrize(
    "work",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool((tensor > 0).any()),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor.unique(),
    ],
)
def test_a_value_that_the_host_needs_is_an_error(work: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        waits(lambda: work(torch.zeros(2, 3, device=DEVICE)))


@pytest.mark.parametrize(
    "work",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.detach().masked_select(tensor > 0),
        lambda tensor: tensor.detach().unique(),
    ],
)
def test_a_read_is_counted(work: Callable[[Tensor], object]) -> None:
    with Reads() as mode:
        work(torch.ones(2, 3, requires_grad=True))
    assert mode.seen


def test_what_goes_over_without_waiting_is_not_counted() -> None:
    assert waits(lambda: torch.zeros(2).to(DEVICE, non_blocking=True) + 1) == []
