"""`body`, the only place where a rule's arithmetic meets its storage, and the ways to run it, chosen in `run`."""
