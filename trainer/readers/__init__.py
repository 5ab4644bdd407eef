"""Datasets on disk (COCO, Pascal VOC, YOLO) to the sample table."""
