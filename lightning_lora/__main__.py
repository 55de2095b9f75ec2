"""`python -m lightning_lora`: the command line."""

import sys

from lightning_lora.cli.main import main

sys.exit(main())
