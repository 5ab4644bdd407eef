"""Training of ViDT detectors with Accelerate, on COCO, VOC, YOLO or embedded data."""
