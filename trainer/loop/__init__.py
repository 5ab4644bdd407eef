"""The parts of the training loop: set-up, one step, optimiser, agreement, resume, signals."""
