"""A run before it starts: its timeline, cost, memory and disk space, and what is wrong with it."""
