"""Operators that torch has a slow kernel of, or none, by those that are fast."""
