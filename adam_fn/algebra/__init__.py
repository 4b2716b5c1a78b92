"""The arithmetic of one array: rules, how they compose, and their hyperparameters."""
