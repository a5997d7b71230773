"""Sweeps: a question in words as a TOML file, trials that share their work, rows that survive anything."""
