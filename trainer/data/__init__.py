"""From the sample table to batches: the dataset check, augmentation, the loader."""
