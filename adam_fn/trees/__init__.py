"""From one leaf to pytrees: optax transformations, their states and what they contain."""
