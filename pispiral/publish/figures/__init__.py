"""The figures, each drawn from a run's records."""
