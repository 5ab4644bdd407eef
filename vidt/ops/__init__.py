"""Deformable attention in each of its forms, and what makes a model faster on a CPU."""
