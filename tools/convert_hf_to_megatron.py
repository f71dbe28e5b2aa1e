"""Convert a Hugging Face directory to a Megatron checkpoint: `megasd convert --to megatron`.

python tools/convert_hf_to_megatron.py Qwen3-8B qwen3-8b-megatron --check
"""

import sys

from megasd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "megatron", *sys.argv[1:]]))
