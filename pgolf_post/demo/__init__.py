"""The demo: the whole pipeline on this machine, from text to quantizers compared at one byte count."""
