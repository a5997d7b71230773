"""Sizing: which model of a recipe gives the lowest expected bpb in a byte budget after so many seconds of training."""
