"""How much static scales of blocks can gain over MeZO: signal, noise and curvature of every block."""
