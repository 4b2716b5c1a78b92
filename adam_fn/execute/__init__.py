"""The step of one leaf, and how it is compiled."""
