"""Run a recipe: `accelerate launch recover.py recipe=smollm2_135m [key.sub=value ...]`."""

import sys

from transmla.cli import main

if __name__ == "__main__":
    sys.exit(main(["recover", *sys.argv[1:]]))
