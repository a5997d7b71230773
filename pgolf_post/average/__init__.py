"""Averages of checkpoints: SWA, post-hoc EMA, and the search for the best of them."""
