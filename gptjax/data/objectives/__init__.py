"""What a model is trained to predict: causal, masked, sequence to sequence; rows and packing."""
