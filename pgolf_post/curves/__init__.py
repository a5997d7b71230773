"""Curves of training runs: read from any log, laid over each other, told apart with their noise."""
