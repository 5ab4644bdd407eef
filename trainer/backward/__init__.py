"""The work of one optimiser step on one process: gradients, their sum over processes, memory."""
