"""EPLB for JAX: expert load balancing inside the jitted program."""
