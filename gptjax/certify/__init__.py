"""Proofs by measurement: every choice of a config, held to its properties."""
