"""Reads and writes adapters as folders in PEFT's format, and translates its keys and its config, whoever wrote them."""
