"""States over many devices, and in the host's memory."""
