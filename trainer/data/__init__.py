"""From the sample table to batches: the dataset check, the loader, the cache."""
