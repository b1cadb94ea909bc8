"""What every test shares: eight virtual CPU devices, set before anything touches JAX."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
