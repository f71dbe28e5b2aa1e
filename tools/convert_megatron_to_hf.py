"""Convert a Megatron checkpoint to a Hugging Face directory: `megasd convert --to hf`.

The checkpoint is one of a run, or a converted one.

python tools/convert_megatron_to_hf.py runs/quickstart/checkpoints/step-80 exported --dtype bfloat16
"""

import sys

from megasd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "hf", *sys.argv[1:]]))
