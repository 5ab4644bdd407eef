"""The dataset readers in one place: each gives a sample table and what it had to leave out."""

from trainer.read_coco import coco_folder, read_coco
from trainer.read_voc import read_voc
from trainer.read_yolo import read_yolo

__all__ = ["coco_folder", "read_coco", "read_voc", "read_yolo"]
