"""Is this machine fit for a run? Software, GPUs, memory, disk, data and speed, looked at before money is spent."""
