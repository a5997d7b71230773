"""A run from its first step to its last: the loop, its state, its log, and its checkpoints."""
