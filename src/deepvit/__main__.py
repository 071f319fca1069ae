"""`python -m deepvit COMMAND ...`: the `deepvit` command."""

import sys

from deepvit.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
