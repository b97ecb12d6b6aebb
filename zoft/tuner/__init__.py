"""PertNN, the networks of a learned optimizer: their inputs, the networks, the normalisation of their outputs."""
