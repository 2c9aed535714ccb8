"""The rules of the gates: functions from a run's records to a verdict with its evidence."""
