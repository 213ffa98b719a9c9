"""The recipe with vLLM on a CPU: `python recipe.py ARGUMENTS`, which are the recipe's own."""

import runpy
import sys
from pathlib import Path

from training import share_one_engine


RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "gsm8k.py"

if __name__ == "__main__":
    share_one_engine()
    sys.argv[0] = str(RECIPE)
    runpy.run_path(str(RECIPE), run_name="__main__")
