"""Stage one: learning a tuner by backpropagating the loss after a zeroth-order step."""
