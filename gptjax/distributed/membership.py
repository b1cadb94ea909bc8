"""Membership: the processes of a run connect to process 0, and notice when one is lost.

JAX's own service has barriers too, but where a process is missing or exits it aborts the others
with a C++ stack trace before Python can report anything, it does not name the process, and it is
private API. So each process opens a connection to process 0 before JAX is initialised; after mutual
authentication the messages are lines of JSON.

The exit of a process, by whatever signal, closes its connection, and all others are notified at
once. A machine that lost power or network closes nothing: there TCP keepalive gives up after
`SILENT_SECONDS`. A process that hangs is left to JAX's heartbeats, and to the time limits of
barriers. JAX's service ends with process 0, and may then abort the others before they report why.
"""

import asyncio
import contextlib
import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from gptjax.config import InputError
from gptjax.distributed.cluster import ProcessInfo, interface
from gptjax.distributed.handshake import SECRET, admits, is_admitted

SILENT_SECONDS = 30
"""Time after which a machine that acknowledges nothing counts as lost."""
GRACE_SECONDS = 30
"""After a process failed: time for the others to fail in the same way by themselves."""
NOTICE_SECONDS = 5
"""Time by which the cause may become known later than a failed collective operation."""
RETRY_SECONDS = 0.25
MOST_NAMED = 20
"""The most addresses of refused connections that the log names."""
END = "the end of the run"
"""The name of the last barrier."""
LONGEST_MESSAGE = 1 << 20
"""Bytes per message; a config has some thousands."""


class Coordinator:
    """Process 0's side: receives messages from all and broadcasts to all, in its own thread.

    It listens on `host`, and accepts only peers that know `secret`.

    Raises:
      InputError: a port that is in use.
    """

    def __init__(self, count: int, secret: bytes, host: str = "", port: int = 0):
        try:
            self._listener = socket.create_server((host, port))
        except OSError as error:
            raise InputError(
                f"Process 0 cannot listen on port {port}: {error.strerror}."
            ) from error
        self.port = self._listener.getsockname()[1]
        self._count = count
        self._secret = secret
        self._hosts: dict[int, str] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._waiting: dict[str, dict[int, Any]] = {}
        self._refused: set[str] = set()
        self._failure: str | None = None
        self._steps: dict[int, int] = {}
        self._over = False
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait a moment for the others to exit first, since JAX's service ends with process 0.

        Otherwise a process that is still saving would be aborted.
        """
        if self._over:
            return
        self._over = True
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        options = {"sock": self._listener, "limit": LONGEST_MESSAGE}
        server = await asyncio.start_server(self._attend, **options)
        await self._closed.wait()
        server.close()
        if attending := asyncio.all_tasks() - {asyncio.current_task()}:
            _, left = await asyncio.wait(attending, timeout=NOTICE_SECONDS)
            for task in left:
                task.cancel()
            await asyncio.wait(attending)
        await asyncio.sleep(0)  # Lets the connections close.

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection from its first line to its end."""
        ends = ConnectionError, asyncio.CancelledError
        with contextlib.closing(writer), contextlib.suppress(*ends):
            _enable_keepalive(writer.get_extra_info("socket"))
            if not await admits(reader, writer, self._secret):
                self._refuse(writer.get_extra_info("peername")[0])
                return
            hello = json.loads(await reader.readline())
            index = hello["index"]
            if not self._greet(index, hello["count"], hello["host"], writer):
                await reader.read()  # Its messages are ignored.
                return
            try:
                async for line in reader:
                    self._receive(index, **json.loads(line))
            finally:
                if self._writers.pop(index, None) and not self._over:
                    self._broadcast(lost=f"{self._name(index)} exited without notice")

    def _refuse(self, address: str) -> None:
        """Report a refused connection, once per address, so that the log stays small."""
        if address not in self._refused and len(self._refused) < MOST_NAMED:
            self._refused.add(address)
            print(
                f"A connection from {address} was refused: it does not know this run's {SECRET}.",
                file=sys.stderr,
            )

    def _greet(self, index: int, count: int, host: str, writer: asyncio.StreamWriter) -> bool:
        name = f"Process {index} on {host}"
        if count != self._count:
            first = f"process 0 on {self._hosts.get(0, 'its host')} as one of {self._count}"
            refusal = f"{name} was started as one of {count}, {first}."
        elif index in self._hosts:
            refusal = f"{name} was started twice: {self._name(index)} joined first."
        else:
            self._hosts[index], self._writers[index] = host, writer
            return True
        if len(self._hosts) < self._count:  # It may be the process that the others wait for.
            self._fail(refusal, writer)
        else:
            _send_to(writer, failed=refusal)
        return False

    def _name(self, index: int) -> str:
        host = self._hosts.get(index)
        return f"process {index} on {host}" if host else f"process {index}"

    def _receive(self, index: int, kind: str, **content: Any) -> None:
        if kind == "gather":
            self._gather(index, **content)
        elif kind == "stop":
            self._broadcast(ask_step=content["number"])
        elif kind == "step":
            self._steps[index] = content["step"]
            if len(self._steps) == self._count:
                self._broadcast(stop_at=1 + max(self._steps.values()), number=content["number"])
        elif kind == "leave":
            writer = self._writers.pop(index)
            self._broadcast(left=f"{self._name(index)} stopped: {content['sentence'].rstrip('.')}")
            _send_to(writer, goodbye=True)

    def _gather(self, index: int, name: str, value: Any, seconds: float) -> None:
        values = self._waiting.setdefault(name, {})
        values[index] = value
        if self._failure:
            _send_to(self._writers[index], failed=self._failure)
        elif len(values) == self._count:
            del self._waiting[name]
            self._broadcast(gathered=[values[other] for other in range(self._count)], at=name)
        elif len(values) == 1:
            self._loop.call_later(seconds, self._expire, name, values, seconds)

    def _expire(self, name: str, values: dict[int, Any], seconds: float) -> None:
        if self._waiting.get(name) is not values:
            return  # All have arrived.
        missing = [self._name(index) for index in range(self._count) if index not in values]
        self._fail(f"{_listed(missing)} of {self._count} did not reach {name} in {seconds:g} s.")

    def _fail(self, sentence: str, *more: asyncio.StreamWriter) -> None:
        """Answer every pending and later gather with this error."""
        self._failure = sentence[0].upper() + sentence[1:]
        for writer in (*more, *self._writers.values()):
            _send_to(writer, failed=self._failure)

    def _broadcast(self, **message: Any) -> None:
        """Send to all; process 0 last, since the message may end it and with it the coordinator."""
        for index in sorted(self._writers, reverse=True):
            _send_to(self._writers[index], **message)


class Member:
    """A process's side; `end(sentence)` is called from a thread when another process is lost.

    Raises:
      InputError: a coordinator that cannot be reached in time or has another secret.
    """

    def __init__(self, process: ProcessInfo, seconds: float, end: Callable[[str], None]):
        self.process = process
        self._address = process.address
        self._end = end
        self._connection = _connect(process, seconds)
        if not is_admitted(self._connection, process.secret):
            self._connection.close()
            raise InputError(
                f"Process {process.index} of {process.count} is refused by the process at "
                f"{process.address}: {SECRET} must be the same for all processes of a run."
            )
        _enable_keepalive(self._connection)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self.waited = 0.0
        """Seconds spent in `gather`."""
        self._closed = False
        self._parting: threading.Timer | None = None
        self._noticed = threading.Event()
        self._reason = ""
        self._change = threading.Condition()
        self._step = 0
        self._asked = False
        """Whether this process has reported its step, and must wait for the others' reports."""
        self._stop: tuple[int, int] | None = None
        self._notified = False
        self._send(index=process.index, count=process.count, host=socket.gethostname())
        self._thread = threading.Thread(target=self._listen, name="member", daemon=True)
        self._thread.start()

    def gather(self, name: str, value: Any, seconds: float) -> list[Any]:
        """The value of every process, in their order, once all have reached `name`.

        Raises:
          InputError: a process that did not arrive in time, by its number and host.
        """
        self._send(kind="gather", name=name, value=value, seconds=seconds)
        with contextlib.suppress(queue.Empty):
            since = time.monotonic()
            answer = self._answers.get(timeout=seconds + RETRY_SECONDS + 1)
            self.waited += time.monotonic() - since
            if "gathered" in answer:
                return answer["gathered"]
            raise InputError(answer["failed"])
        raise InputError(f"The coordinator at {self._address} does not answer in {seconds:g} s.")

    def agreed_stop(self, step: int, signal: int | None) -> int | None:
        """The signal for which all processes stop at `step`; each calls this at every step.

        A process that got a signal notifies the coordinator, which asks all for their step. After
        its answer a process begins no other step until the largest of all answers is known, so that
        none is beyond the step after it: there all stop.
        """
        with self._change:
            self._step = step
            if signal is not None and not self._notified:
                self._notified = True
                self._send(kind="stop", number=signal)
            self._change.wait_for(lambda: self._stop or not self._asked)
            return self._stop[1] if self._stop and step >= self._stop[0] else None

    def leave(self, sentence: str) -> None:
        """Tell the others why this process stops, so that they stop too."""
        with contextlib.suppress(OSError, queue.Empty):
            self._send(kind="leave", sentence=sentence)
            while "goodbye" not in self._answers.get(timeout=RETRY_SECONDS):
                pass

    def blame(self) -> None:
        """After a failed collective operation: end this process if another one caused it."""
        if self._noticed.wait(NOTICE_SECONDS):
            self._lose(self._reason)

    def close(self) -> None:
        """Close the connection; other processes are no longer watched."""
        self._closed = True
        if self._parting:
            self._parting.cancel()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def _send(self, **message: Any) -> None:
        with self._change:
            self._connection.sendall(_line(message))

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._connection.makefile() as lines:
            for line in lines:
                self._receive(json.loads(line))
        with self._change:  # No answer will come.
            self._asked = False
            self._change.notify_all()
        if not self._parting:
            self._lose(f"process 0, the coordinator at {self._address}, exited without notice")

    def _receive(self, message: dict[str, Any]) -> None:
        if "lost" in message:
            self._lose(message["lost"])
        elif "left" in message:
            if not self._parting:
                self._parting = threading.Timer(GRACE_SECONDS, self._lose, [message["left"]])
                self._parting.daemon = True
                self._parting.start()
                self._reason = message["left"]
                self._noticed.set()
        elif "ask_step" in message:
            with self._change:
                if not self._asked:
                    self._asked = True
                    self._send(kind="step", step=self._step, number=message["ask_step"])
        elif "stop_at" in message:
            with self._change:
                self._stop = message["stop_at"], message["number"]
                self._change.notify_all()
        else:
            self._closed = self._closed or message.get("at") == END
            self._answers.put(message)

    def _lose(self, sentence: str) -> None:
        if not self._closed:
            self._end(sentence[0].upper() + sentence[1:])


def _connect(process: ProcessInfo, seconds: float) -> socket.socket:
    host, _, port = process.address.rpartition(":")
    if process.index == 0:
        host = interface(process.address) or "127.0.0.1"
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = max(RETRY_SECONDS, deadline - time.monotonic())
            connection = socket.create_connection((host, int(port)), timeout=left)
            connection.settimeout(None)
            return connection
        except (OSError, OverflowError) as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError(
                    f"Process {process.index} of {process.count} cannot reach the coordinator, "
                    f"process 0 at {process.address}, in {seconds:g} s: {reason.lower()}."
                ) from error
            time.sleep(RETRY_SECONDS)


def _enable_keepalive(connection: socket.socket) -> None:
    """Enable TCP keepalive, which detects that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = {"TCP_KEEPIDLE": SILENT_SECONDS // 3, "TCP_KEEPINTVL": SILENT_SECONDS // 6}
    for name, value in {**every, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):  # Not on every system: there it takes hours.
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send_to(writer: asyncio.StreamWriter, **message: Any) -> None:
    writer.write(_line(message))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
