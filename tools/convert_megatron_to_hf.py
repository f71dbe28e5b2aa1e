"""A Megatron checkpoint, a run's or a converted one -> a Hugging Face directory. The same as
`megasd convert --to hf`.

python tools/convert_megatron_to_hf.py runs/quickstart/checkpoints/step-80 exported --dtype bfloat16
"""

import sys

from megasd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "hf", *sys.argv[1:]]))
