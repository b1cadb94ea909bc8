"""What may be said of the runs: intervals, verdicts, scaling laws."""
