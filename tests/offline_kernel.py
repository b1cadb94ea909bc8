"""The kernel of the notebooks' tests: IPython's own, from which Python reaches this machine alone.

Started by tests/test_notebooks.py. An audit hook sees what any Python code asks of sockets, and
cannot be taken off again; a C library with sockets of its own would not be seen.
"""

import sys
from typing import Any

from ipykernel.kernelapp import launch_new_instance

ASKED = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}
"""Events with a host among their arguments, and where."""
SENT = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}
"""Events with an address: a host and a port, a path, or none for a socket that has one."""
HERE = {None, "", "localhost", "127.0.0.1", "::1"}


def refuse_other_hosts(event: str, arguments: tuple[Any, ...]) -> None:
    """What comes of a network that is not there."""
    if event in ASKED:
        host = arguments[ASKED[event]]
    elif event in SENT and isinstance(arguments[SENT[event]], tuple):
        host = arguments[SENT[event]][0]
    else:
        return
    if host not in HERE:
        raise OSError(f"{event} of {host}: notebooks run offline")


sys.addaudithook(refuse_other_hosts)
launch_new_instance()
