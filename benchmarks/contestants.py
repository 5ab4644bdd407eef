"""What is measured: the detector, and as the floor timm's plain backbone of the same sizes, without
[DET] tokens.

Forward is as in prediction. Learning is forward, criterion and backward; the floor's is forward and
backward of the features' sum. A training step is learning, clipping, optimiser and moving average.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from laps import Contestant, Laps
from trainer.loop.optim import make_ema, make_optimizer
from trainer.settings.config import TrainConfig
from vidt import ViDT, ViDTConfig
from vidt.losses.criterion import criterion_for
from vidt.model.config import SWIN_VARIANTS
from vidt.model.swin import WINDOW
from vidt.ops.packing import pack, unpack

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, LEARNING, TRAINING = "forward", "learning", "training step"
FLOOR_FORWARD, FLOOR_LEARNING = "timm forward", "timm learning"
UPDATE = ("clip", "optimiser", "EMA")  # parts of a training step that learning is without
OBJECTS = 8  # boxes of each image
# Ten short sides of the multi-scale recipe, whose evaluation size is 640 pixels.
RECIPE_SIDES, RECIPE_EVAL_SIZE = range(480, 800, 32), 640
PLUS: dict[str, Any] = {"det_token_num": 300, "epff": True, "iou_aware": True, "token_label": True}


@dataclass(frozen=True)
class Case:
    """One setting; `size` is (images, height, width); with `plus` the detector is ViDT+."""

    backbone_name: str
    size: tuple[int, int, int]
    plus: bool
    device: str
    precision: str
    threads: int
    new_sizes: bool = False  # a new picture size in every round

    @property
    def config(self) -> ViDTConfig:
        return ViDTConfig(backbone_name=self.backbone_name, **PLUS if self.plus else {})

    @property
    def autocast(self) -> Callable[[], torch.autocast]:
        dtype = PRECISIONS[self.precision]
        device = torch.device(self.device).type
        return partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)

    def images(self, canvas: tuple[int, int] | None = None) -> Tensor:
        """Random, of the case's own size or of another canvas (height, width)."""
        return torch.randn(self.size[0], 3, *(canvas or self.size[1:]), device=self.device)

    def canvases(self) -> Iterator[tuple[int, int]]:
        """The canvas of each round: with new_sizes the size, scaled as the recipe does, in an order
        that is the same for all contestants.
        """
        if not self.new_sizes:
            return cycle([self.size[1:]])
        sides = list(RECIPE_SIDES)
        random.Random(0).shuffle(sides)
        height, width = self.size[1:]
        scales = [side / RECIPE_EVAL_SIZE for side in sides]
        return cycle([(_whole(height * scale), _whole(width * scale)) for scale in scales])


def _whole(side: float) -> int:
    """To a multiple of 16 pixels, as the recipe rounds its canvases."""
    return max(int(side) // 16, 1) * 16


class Detector:
    """The detector with all that trains it, on one batch of random images and boxes."""

    def __init__(self, case: Case) -> None:
        recipe = TrainConfig()
        self.case, self.max_norm = case, recipe.clip_max_norm
        self.model = ViDT(case.config).to(case.device)
        self.criterion = criterion_for(case.config)
        self.optimizer = make_optimizer(self.model, recipe)
        self.ema = make_ema(self.model, recipe.ema_decay)
        self.set_canvas(case.size[1:])
        self.targets = [random_objects(self.images.device) for _ in self.images]
        self.steps = 0

    def set_canvas(self, canvas: tuple[int, int]) -> None:
        self.images = self.case.images(canvas)
        self.padding = torch.zeros_like(self.images[:, 0], dtype=torch.bool)

    def contestants(self, how: str, call: Callable[..., dict[str, Any]]) -> list[Contestant]:
        """`call` is the model, or the model compiled."""
        predict, train = partial(self.predict, call), partial(self.train, call)
        to_predict, to_train = self.case.canvases(), self.case.canvases()

        def prepare_to_predict() -> None:
            self.set_canvas(next(to_predict))
            self.pack(how)

        def prepare_to_train() -> None:
            self.set_canvas(next(to_train))
            unpack(self.model)

        return [
            Contestant(FORWARD, how, self.model, False, predict, prepare_to_predict),
            Contestant(TRAINING, how, self.model, True, train, prepare_to_train),
        ]

    def pack(self, how: str) -> None:
        """As a predictor does."""
        if how == "eager" and self.case.precision == "no":
            pack(self.model)
        else:
            unpack(self.model)

    def eager(self) -> list[Contestant]:
        return self.contestants("eager", self.model)

    def compiled(self) -> list[Contestant]:
        return self.contestants("compiled", torch.compile(self.model))

    def graphed(self) -> Contestant:
        """CUDA graphs; of prediction only."""
        call = torch.compile(self.model, mode="reduce-overhead")
        return Contestant(FORWARD, "graphs", self.model, False, partial(self.predict, call))

    def predict(self, call: Callable[..., dict[str, Any]], laps: Laps) -> None:
        with laps.part("forward"), self.case.autocast():
            call(self.images, self.padding, detections_only=True)

    def train(self, call: Callable[..., dict[str, Any]], laps: Laps) -> None:
        with laps.part("forward"), self.case.autocast():
            outputs = call(self.images, self.padding)
        with laps.part("criterion"):
            terms = self.criterion(outputs, self.targets, len(self.images) * OBJECTS)
            loss = torch.stack(list(terms.values())).sum()
        with laps.part("backward"):
            loss.backward()
        with laps.part("clip"):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        with laps.part("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with laps.part("EMA"):
            self.steps += 1
            self.ema.update(self.model, step=self.steps)


class Floor:
    """timm's backbone on random images."""

    def __init__(self, case: Case) -> None:
        self.case, self.backbone = case, floor_backbone(case).to(case.device)
        self.images = case.images()

    def set_canvas(self, canvas: tuple[int, int]) -> None:
        """timm's shift masks for it are made here, and not timed."""
        if canvas == tuple(self.images.shape[2:]):
            return
        self.images = self.case.images(canvas)
        self.backbone.set_input_size(canvas, window_size=WINDOW)

    def contestants(self, how: str, call: Callable[[Tensor], Tensor]) -> list[Contestant]:
        to_predict, to_learn = self.case.canvases(), self.case.canvases()
        return [
            Contestant(
                FLOOR_FORWARD,
                how,
                self.backbone,
                False,
                partial(self.predict, call),
                lambda: self.set_canvas(next(to_predict)),
            ),
            Contestant(
                FLOOR_LEARNING,
                how,
                self.backbone,
                True,
                partial(self.learn, call),
                lambda: self.set_canvas(next(to_learn)),
            ),
        ]

    def eager(self) -> list[Contestant]:
        return self.contestants("eager", self.backbone.forward_features)

    def compiled(self) -> list[Contestant]:
        return self.contestants("compiled", torch.compile(self.backbone.forward_features))

    def predict(self, call: Callable[[Tensor], Tensor], laps: Laps) -> None:
        with laps.part("forward"), self.case.autocast():
            call(self.images)

    def learn(self, call: Callable[[Tensor], Tensor], laps: Laps) -> None:
        with laps.part("forward"), self.case.autocast():
            features = call(self.images)
        with laps.part("backward"):
            features.sum().backward()
            self.backbone.zero_grad()


def floor_backbone(case: Case) -> Any:
    """A model of timm's with `forward_features`, and no head."""
    image = case.size[1:]
    if case.backbone_name not in SWIN_VARIANTS:
        return timm.create_model(case.backbone_name, img_size=image, num_classes=0)
    variant = SWIN_VARIANTS[case.backbone_name]
    return SwinTransformer(
        img_size=image,
        window_size=WINDOW,
        embed_dim=variant.embed_dim,
        depths=variant.depths,
        num_heads=variant.num_heads,
        drop_path_rate=variant.drop_path,
        num_classes=0,
    )


def random_objects(device: torch.device) -> dict[str, Tensor]:
    """Labels [N] and boxes [N, 4], cxcywh in 0..1."""
    centres, sides = torch.rand(2, OBJECTS, 2) * 0.4 + 0.1
    boxes = torch.cat([centres + 0.2, sides], dim=1)
    return {"labels": torch.arange(OBJECTS, device=device), "boxes": boxes.to(device)}
