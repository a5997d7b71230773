"""The model: its architecture as settings, and one file for each of its parts."""
