"""Blocks: the weights' names, and the layers through which functions read them (perturbed, widened, streamed)."""
