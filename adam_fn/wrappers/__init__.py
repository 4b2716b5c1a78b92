"""Transformations around an optimizer, and those that are not elementwise."""
