"""Training and timing of a comparison's runs."""
