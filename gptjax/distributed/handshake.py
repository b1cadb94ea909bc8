"""Who may speak with process 0: those that know the run's secret.

Both sides prove it before anything else is said, and neither sends it (HMAC-SHA256, RFC 2104, of a
challenge that the other side drew). What follows is not encrypted: it is names of hosts, configs
and steps.

| who | sends | bytes |
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
"""The environment variable with what all processes of a run know, and nobody else."""
LEAST_CHARACTERS = 16
CHALLENGE_BYTES = 32
SECONDS = 10
"""What a connection has to prove that it knows the secret."""


def new_secret() -> str:
    """A secret for a run, as the environment variable holds it."""
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
    """Process 0's side: whether who connected knows the secret, and has been shown that we do."""
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
    """The other processes' side: whether process 0 knows the secret, and has let this one in."""
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
    """Each role answers in its own way, so that no answer can be sent back as one's own."""
    return hmac.digest(secret, role + challenge, "sha256")


def _received(connection: socket.socket) -> bytes:
    received = b""
    while len(received) < CHALLENGE_BYTES:
        more = connection.recv(CHALLENGE_BYTES - len(received))
        if not more:
            raise ConnectionError
        received += more
    return received
