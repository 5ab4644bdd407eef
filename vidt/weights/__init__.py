"""Weights files: ours, the released ones, and what is published where."""
