"""SGLang's server with the key of the environment.

    python -m megasd.engine.sglang_with_key --model-path DIR ...

It does what sglang.launch_server does, and reads the key from the environment: `--api-key` would
show in process lists.
"""

from __future__ import annotations

import os
import sys

from megasd.engine.auth import protect


def main(argv: list[str]) -> None:
    """Serve until killed; `argv` is what sglang.launch_server takes."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(argv)
    protect(server_args)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


# Without this condition SGLang's children, which import this file again, would serve too.
if __name__ == "__main__":
    main(sys.argv[1:])
