"""One file a method; each ends in its entry in the table of methods."""
