"""The cost of a model: parameters, FLOPs and bytes of a config, and the peaks of chips."""
