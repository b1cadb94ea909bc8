"""Training objectives: causal, masked, sequence to sequence; rows and packing."""
