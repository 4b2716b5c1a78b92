"""How the step of one leaf is computed."""
