"""Caches of keys and values that take fewer bytes a token."""
