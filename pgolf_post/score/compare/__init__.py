"""Paired comparison of two scores: intervals, screening, and the difference the unquantized model expects."""
