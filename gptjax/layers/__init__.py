"""The layers of the models, one module per choice that variants differ in."""
