"""The runs of a comparison, trained and timed."""
