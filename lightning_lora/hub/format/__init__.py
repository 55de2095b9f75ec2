"""The folder that PEFT reads: its keys and its config, in both directions, for files of anybody."""
