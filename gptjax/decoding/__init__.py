"""Decoding: sampling with a key/value cache, and beam search."""
