"""Runs /in/program.py inside the sandbox, in a process of its own: `python -I -S sandbox_program.py
SITE_PACKAGES [FUNCTION]`.

Without FUNCTION the program is a script on standard input. With it, standard input is a JSON list
of arguments, and the JSON result goes to standard output. Nothing in this process is trusted: what
is right is decided outside. Small, because it starts once a test.
"""

import json
import os
import sys

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
# What solutions of function tasks use without importing it, as the sites that such tasks come from have it.
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


def main(site_packages, fn_name=None):
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
    # what the program prints is no result
    os.dup2(2, 1)
    space = {"__name__": "program"}
    exec(PREAMBLE, space)
    # operator.add is no answer to a task named add
    given = space.get(fn_name)
    exec(compile(code, "program.py", "exec"), space)
    function = getattr(space["Solution"](), fn_name, None) if "Solution" in space else space.get(fn_name)
    if function is None or function is given:
        raise NameError(f"the program defines no function {fn_name}")
    result = function(*arguments)
    with os.fdopen(result_fd, "w") as file:
        json.dump(result, file)


def refuse_network(event, arguments):
    if event in NETWORK_EVENTS:
        os._exit(NETWORK)


if __name__ == "__main__":
    main(*sys.argv[1:])
