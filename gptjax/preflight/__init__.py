"""Compile a run ahead of time for absent accelerators: memory, communication, step time."""
