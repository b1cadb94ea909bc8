"""Where the time of a training step goes: JAX's trace of some steps, and a table by part."""
