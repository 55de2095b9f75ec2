"""Rewrites an adapter for the program that will serve it."""
