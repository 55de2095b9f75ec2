"""Reads adapter folders without a model and writes others: exported, combined, resized or repaired."""
