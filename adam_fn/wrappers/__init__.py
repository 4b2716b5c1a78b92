"""What is not elementwise, and what is done around an optimizer."""
