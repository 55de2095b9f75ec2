"""An adapter rewritten for the program that will serve it."""
