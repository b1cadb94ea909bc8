"""The models: what people look for first."""
