"""COCO's numbers, confusions, and the evaluation of a model."""
