"""`python -m lightning_lora.cli`, for an environment whose scripts are not on the PATH."""

import sys

from lightning_lora.cli.main import main

sys.exit(main())
