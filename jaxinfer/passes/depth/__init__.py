"""Fewer layers: left out for good, for some tokens, or for the tokens of late positions."""
