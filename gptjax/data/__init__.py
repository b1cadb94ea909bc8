"""Text to token batches, deterministic and resumable."""
