"""Which part of the detector is at work: hooks on its modules that tell the laps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ceiling import FlopMeter
from contestants import Detector
from laps import Contestant, Gains, Laps

# Attributes of the model. A head that the decoder calls counts as a head.
PARTS = {
    "backbone": ("backbone",),
    "projections": ("input_proj", "tgt_proj", "query_pos_proj"),
    "decoder": ("decoder",),
    "heads": ("class_embed", "bbox_embed", "iou_embed", "vector_embed", "token_head"),
}
BACKBONE_BACKWARD = "backward: backbone"


@contextmanager
def watch(detector: Detector, laps: Laps) -> Iterator[None]:
    """Meanwhile the laps know the parts of the forward pass, the matcher, and in backward when the
    backbone's begins.
    """
    handles = [
        handle
        for part, names in PARTS.items()
        for name in names
        for module in _modules(getattr(detector.model, name, None))
        for handle in _report(module, part, laps)
    ]
    handles += _report(detector.criterion.matcher, "matcher", laps)

    backbone = detector.model.backbone
    handles.append(backbone.register_forward_hook(lambda *call: _await_gradients(call[-1], laps)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watched(contestant: Contestant, detector: Detector) -> Contestant:
    """The same, of which the parts can be told."""

    def run(laps: Laps) -> None:
        with watch(detector, laps):
            contestant.run(laps)

    return replace(contestant, run=run)


def count_flops(contestant: Contestant) -> Gains:
    """Floating point operations of each part of one run, at the case's own size and with weights as
    they are: PyTorch's counter does not know packed products.
    """
    contestant = replace(contestant, prepare=lambda: None)
    with frozen(contestant), FlopCounterMode(display=False) as counter:
        laps = contestant.go(FlopMeter(counter))
    return laps.gains()


@contextmanager
def frozen(contestant: Contestant) -> Iterator[None]:
    """Unless it learns: the counter looks for gradients of all that could have some, and fails
    where there are none.
    """
    learning = [each for each in contestant.module.parameters() if each.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(contestant.learns)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()


def _modules(part: nn.Module | None) -> list[nn.Module]:
    """A list of modules is never called: those in it are."""
    if part is None:
        return []
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _report(module: nn.Module, part: str, laps: Laps) -> list[RemovableHandle]:
    return [
        module.register_forward_pre_hook(lambda *_: laps.enter(part)),
        module.register_forward_hook(lambda *_: laps.leave()),
    ]


def _await_gradients(outputs: Any, laps: Laps) -> Any:
    """The same outputs of the backbone. Autograd goes backward in order: once each of them has its
    gradient, what is left of the backward pass is the backbone's.
    """
    missing = 0

    def arrived(gradient: Tensor) -> None:
        nonlocal missing
        missing -= 1
        if missing == 0:
            laps.turn_into(BACKBONE_BACKWARD)

    def awaited(output: Any) -> Any:
        nonlocal missing
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return output
        missing += 1
        outside = output.view_as(output)  # has no gradient from inside the backbone
        outside.register_hook(arrived)
        return outside

    return tree_map(awaited, outputs)
