"""Which card fits which model: by hash, lineage or weights."""
