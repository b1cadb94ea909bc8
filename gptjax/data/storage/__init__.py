"""Tokens on disk: tokenised once, memory-mapped."""
