"""Who runs the trials: this process or several on this machine, torchrun's ranks, or Ray. The rows are the same."""
