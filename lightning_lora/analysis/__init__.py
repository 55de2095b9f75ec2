"""Looks into adapters: what their updates are, what they do to a language model, and whether a server applies them."""
