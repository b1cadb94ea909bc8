"""Mutual authentication of the processes of a run, by a shared secret.

Both sides prove knowledge of the secret before any other message, and neither sends it: each
answers the other's random challenge by HMAC-SHA256 (RFC 2104). Later messages are not encrypted:
they are host names, configs and steps.

| sender | message | bytes |
|---|---|---|
| process 0 | a challenge | 32 |
| a process | its own challenge, its answer to process 0's | 64 |
| process 0 | its answer | 32 |
"""

import asyncio
import hmac
import secrets
import socket
from collections.abc import Mapping

from gptjax.config import InputError

SECRET = "GPTJAX_SECRET"
"""The environment variable with the secret of a run."""
LEAST_CHARACTERS = 16
CHALLENGE_BYTES = 32
SECONDS = 10
"""Time limit for a connection to authenticate."""


def new_secret() -> str:
    """A random secret for a run, as the environment variable holds it."""
    return secrets.token_hex(CHALLENGE_BYTES)


def secret_of(environment: Mapping[str, str]) -> bytes:
    """The secret of this process's run.

    Raises:
      InputError: none, or one that is easily guessed.
    """
    secret = environment.get(SECRET, "")
    if len(secret) < LEAST_CHARACTERS:
        found = f"has {len(secret)} characters" if secret else "is not set"
        raise InputError(
            f"{SECRET} {found}: all processes of a run need the same one, of at least "
            f"{LEAST_CHARACTERS} characters that nobody else knows."
        )
    return secret.encode()


async def admits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> bool:
    """Process 0's side: whether the peer knows the secret; if so, answers its challenge."""
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    writer.write(challenge)
    try:
        async with asyncio.timeout(SECONDS):
            theirs = await reader.readexactly(CHALLENGE_BYTES)
            answer = await reader.readexactly(CHALLENGE_BYTES)
    except (TimeoutError, asyncio.IncompleteReadError):
        return False
    if not hmac.compare_digest(answer, _answer(secret, b"process", challenge)):
        return False
    writer.write(_answer(secret, b"process 0", theirs))
    return True


def is_admitted(connection: socket.socket, secret: bytes) -> bool:
    """The other processes' side: whether process 0 knows the secret and accepted this one."""
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    connection.settimeout(SECONDS)
    try:
        theirs = _received(connection)
        connection.sendall(challenge + _answer(secret, b"process", theirs))
        answer = _received(connection)
    except (ConnectionError, TimeoutError):
        return False
    connection.settimeout(None)
    return hmac.compare_digest(answer, _answer(secret, b"process 0", challenge))


def _answer(secret: bytes, role: bytes, challenge: bytes) -> bytes:
    """The answer to a challenge; it depends on the role, so that no answer can be reflected."""
    return hmac.digest(secret, role + challenge, "sha256")


def _received(connection: socket.socket) -> bytes:
    received = b""
    while len(received) < CHALLENGE_BYTES:
        more = connection.recv(CHALLENGE_BYTES - len(received))
        if not more:
            raise ConnectionError
        received += more
    return received
