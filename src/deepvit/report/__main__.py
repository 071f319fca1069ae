"""`python -m deepvit.report`: `deepvit report`."""

import sys

from deepvit.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
