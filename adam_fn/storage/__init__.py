"""Storage of moments and parameters in few bits."""
