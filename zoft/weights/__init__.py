"""How weights are named, read, replaced on use, and moved between devices."""
