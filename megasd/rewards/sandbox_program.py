"""Runs /in/program.py inside the sandbox: `python -I -S sandbox_program.py SITE_PACKAGES [FUNCTION]`.

Each test has a process of this file. Without FUNCTION the program is a script on standard input.
With FUNCTION, standard input is a JSON list of arguments, and the JSON result goes to standard
output. Nothing in this process is trusted: the caller outside decides what is right.

The file is small and imports little, because it starts once a test. It has no `from __future__`
line: the program would inherit it.
"""

import json
import os
import sys

# Type checkers take this for True. Importing typing would cost each test a few milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# exit status of a program that asked for the network
NETWORK = 77
NETWORK_EVENTS = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "socket.sendmsg",
    "socket.bind",
)
# Solutions of function tasks use these names without importing them, because the sites that the
# tasks come from provide them.
PREAMBLE = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from typing import *
from builtins import *
"""


def main(site_packages: str, fn_name: str | None = None) -> None:
    """Run the program. `site_packages`: a JSON list of directories; `fn_name`: the function to call."""
    sys.path += json.loads(site_packages)
    with open("/in/program.py", encoding="utf-8") as file:
        code = file.read()
    sys.argv = ["program.py"]
    sys.addaudithook(refuse_network)
    if fn_name is None:
        exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
        return
    arguments = json.load(sys.stdin)
    result_fd = os.dup(1)
    # Prints of the program go to standard error: they are no result.
    os.dup2(2, 1)
    space: dict[str, Any] = {"__name__": "program"}
    exec(PREAMBLE, space)
    # A name of the preamble is no answer: operator.add does not solve a task named add.
    given = space.get(fn_name)
    exec(compile(code, "program.py", "exec"), space)
    function = getattr(space["Solution"](), fn_name, None) if "Solution" in space else space.get(fn_name)
    if function is None or function is given:
        raise NameError(f"the program defines no function {fn_name}")
    result = function(*arguments)
    with os.fdopen(result_fd, "w") as file:
        json.dump(result, file)


def refuse_network(event: str, arguments: "tuple[Any, ...]") -> None:
    """An audit hook: end the process when the program asks for the network."""
    if event in NETWORK_EVENTS:
        os._exit(NETWORK)


if __name__ == "__main__":
    main(*sys.argv[1:])
