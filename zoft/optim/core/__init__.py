"""The engine of every method: measure a step into a record, apply a record to the weights."""
