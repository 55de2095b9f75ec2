"""What a run on the command line is made of: data, tasks and base models. No LoRA is in it."""
