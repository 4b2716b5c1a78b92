"""How moments and parameters are stored in few bits."""
