"""What a model costs: parameters, FLOPs and bytes of a config, and the chips that pay for them."""
