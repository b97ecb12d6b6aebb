"""Where cards are kept: a local folder, any address that fsspec reads, the cards that come with zoft."""
