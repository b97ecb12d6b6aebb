"""Zeroth-order optimizers with the torch.optim interface; they know no files and no Hub."""
