"""`python -m deepvit.bench`: `deepvit bench`."""

import sys

from deepvit.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
