"""From a config to a directory with a trained model."""
