"""Who races: the detector, and for the floor the plain body of the same sizes without [DET] tokens,
as timm builds it.

Forward is as in prediction. Learning is forward, criterion and backward; the floor's is forward and
backward of the features' sum. A training step is learning, clipping, optimiser and moving average.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from vidt.ops.packing import pack, unpack

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, LEARNING, TRAINING = "forward", "learning", "training step"
FLOOR_FORWARD, FLOOR_LEARNING = "timm forward", "timm learning"
UPDATE = ("clip", "optimiser", "EMA")  # parts of a training step that learning is without
OBJECTS = 8  # boxes of each image
PLUS: dict[str, Any] = {"det_token_num": 300, "epff": True, "iou_aware": True, "token_label": True}


@dataclass(frozen=True)
class Case:
    """What is raced on; `size` is (images, height, width); with `plus` the detector is ViDT+."""

    backbone_name: str
    size: tuple[int, int, int]
    plus: bool
    device: str
    precision: str
    threads: int

    @property
    def config(self) -> ViDTConfig:
        return ViDTConfig(backbone_name=self.backbone_name, **PLUS if self.plus else {})

    @property
    def autocast(self) -> Callable[[], torch.autocast]:
        dtype = PRECISIONS[self.precision]
        device = torch.device(self.device).type
        return partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)

    def images(self) -> Tensor:
        num_images, height, width = self.size
        return torch.randn(num_images, 3, height, width, device=self.device)


class Detector:
    """The detector with all that trains it, on one batch of random images and boxes."""

    def __init__(self, case: Case) -> None:
        recipe = TrainConfig()
        self.case, self.max_norm = case, recipe.clip_max_norm
        self.model = ViDT(case.config).to(case.device)
        self.criterion = criterion_for(case.config)
        self.optimizer = make_optimizer(self.model, recipe)
        self.ema = make_ema(self.model, recipe.ema_decay)
        self.images = case.images()
        self.padding = torch.zeros_like(self.images[:, 0], dtype=torch.bool)
        self.targets = [random_objects(self.images.device) for _ in self.images]
        self.steps = 0

    def contestants(self, how: str, call: Callable[..., dict[str, Any]]) -> list[Contestant]:
        """`call` is the model, or the model compiled."""
        predict, train = partial(self.predict, call), partial(self.train, call)
        packs, unpacks = partial(self.pack, how), partial(unpack, self.model)
        return [
            Contestant(FORWARD, how, self.model, False, predict, packs),
            Contestant(TRAINING, how, self.model, True, train, unpacks),
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
    """timm's body on random images."""

    def __init__(self, case: Case) -> None:
        self.case, self.body = case, floor_body(case).to(case.device)
        self.images = case.images()

    def contestants(self, how: str, call: Callable[[Tensor], Tensor]) -> list[Contestant]:
        return [
            Contestant(FLOOR_FORWARD, how, self.body, False, partial(self.predict, call)),
            Contestant(FLOOR_LEARNING, how, self.body, True, partial(self.learn, call)),
        ]

    def eager(self) -> list[Contestant]:
        return self.contestants("eager", self.body.forward_features)

    def compiled(self) -> list[Contestant]:
        return self.contestants("compiled", torch.compile(self.body.forward_features))

    def predict(self, call: Callable[[Tensor], Tensor], laps: Laps) -> None:
        with laps.part("forward"), self.case.autocast():
            call(self.images)

    def learn(self, call: Callable[[Tensor], Tensor], laps: Laps) -> None:
        with laps.part("forward"), self.case.autocast():
            features = call(self.images)
        with laps.part("backward"):
            features.sum().backward()
            self.body.zero_grad()


def floor_body(case: Case) -> Any:
    """A model of timm's with `forward_features`, and no head."""
    image = case.size[1:]
    if case.backbone_name not in SWIN_VARIANTS:
        return timm.create_model(case.backbone_name, img_size=image, num_classes=0)
    variant = SWIN_VARIANTS[case.backbone_name]
    return SwinTransformer(
        img_size=image,
        window_size=7,
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
