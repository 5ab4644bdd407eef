"""The three tasks: training, inference, mining."""
