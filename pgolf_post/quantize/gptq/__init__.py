"""GPTQ: its definition in plain loops (reference), its driver, and the kernels that make it fast."""
