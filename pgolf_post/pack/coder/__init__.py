"""The entropy coder: contexts, row shifts, frequency tables, rANS and its kernels."""
