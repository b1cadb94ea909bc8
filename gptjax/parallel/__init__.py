"""Parallelism over many devices: meshes, sharding rules, pipeline stages."""
