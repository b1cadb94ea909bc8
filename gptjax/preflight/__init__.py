"""Compile a run for machines that are not there: does it fit, what takes the memory, how long."""
