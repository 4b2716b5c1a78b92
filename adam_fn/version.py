"""The version, which nothing else repeats."""

__version__ = "0.1.0"
