"""Prediction: images in, detections out."""
