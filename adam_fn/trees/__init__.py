"""Pytrees: optax transformations, their states and the members of other transformations."""
