"""COCO metrics, the confusion matrix, and the evaluation of a model."""
