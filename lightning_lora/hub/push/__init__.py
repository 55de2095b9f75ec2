"""Pushes an adapter as one commit to the Hub: it is staged, checked, and committed once."""
