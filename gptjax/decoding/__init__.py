"""Text from a model: sampling with a cache, beam search."""
