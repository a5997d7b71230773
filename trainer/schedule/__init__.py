"""Learning rates, loops, stages and clocks as functions of a run's progress."""
