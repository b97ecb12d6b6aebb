"""Stores of cards: the local folder, remote file systems, and the cards shipped with zoft."""
