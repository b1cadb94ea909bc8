"""Many devices: sharding rules, meshes, pipeline stages."""
