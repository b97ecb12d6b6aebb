"""How the cost of a step depends on the size of the model, the batch, its length and the probes."""
