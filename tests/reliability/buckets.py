"""Stores on this machine that speak the protocols of the clouds, for tests and trials."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ENDPOINT = "AWS_ENDPOINT_URL"
START_SECONDS = 60
S3 = """
import logging, signal, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1])).start()
signal.pause()
"""


@contextlib.contextmanager
def s3(bucket: str, directory: Path) -> Iterator[None]:
    """An S3 server (moto) with a bucket, and the environment in which processes find it.

    Their caches are below `directory` meanwhile.
    """
    port = _free_port()
    changed = {
        ENDPOINT: f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(directory / "caches"),
    }
    with _environment(changed), _serving([sys.executable, "-c", S3, str(port)], port):
        make = "import fsspec, sys; fsspec.filesystem('s3').mkdir(sys.argv[1])"
        subprocess.run([sys.executable, "-c", make, bucket], check=True)
        yield


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextlib.contextmanager
def _environment(changed: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _serving(command: list[str], port: int) -> Iterator[None]:
    """A server, from when it listens on the port."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.create_connection(("127.0.0.1", port)),
            ):
                break
            assert server.poll() is None, command
            assert time.monotonic() < end, command
            time.sleep(0.1)
        yield
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
