"""Tokens on disk: encoded once, memory-mapped."""
