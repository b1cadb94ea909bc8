"""Certification: numerical checks that every variant has the properties it must have."""
