"""Losses, optimizers, the step, the loop and its checkpoints: nothing here knows a model."""
