"""Pixels: image files, preprocessing, batches, drawing."""
