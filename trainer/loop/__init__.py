"""The parts of the training loop: optimiser, one step, agreement, resume, signals."""
