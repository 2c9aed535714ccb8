"""The tables, each made from a run's records."""
