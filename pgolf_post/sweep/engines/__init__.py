"""Engines that run the trials: processes of this machine, torchrun's ranks, or Ray. The rows are the same."""
