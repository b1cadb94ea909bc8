"""Analysis of the runs: intervals, verdicts, scaling laws."""
