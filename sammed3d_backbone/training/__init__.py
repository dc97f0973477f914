"""The small pieces every recipe shares: the loop's body, the optimiser, the run folder."""
