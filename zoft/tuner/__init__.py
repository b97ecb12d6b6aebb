"""PertNNs, the networks of a tuner: their inputs, the networks, the normalisation of their outputs."""
