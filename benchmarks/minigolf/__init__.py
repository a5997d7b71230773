"""Mini golf: the challenge in miniature, played on two CPU cores and counted in processor seconds."""
