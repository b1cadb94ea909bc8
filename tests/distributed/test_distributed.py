"""Processes that meet: here threads, which need no JAX; test_processes.py has real ones."""

import contextlib
import queue
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gptjax import distributed
from gptjax.config import InputError
from gptjax.distributed.cluster import (
    ProcessInfo,
    find_process,
    first_host,
    free_port,
    has_tpu,
    interface,
)
from gptjax.distributed.membership import END, Coordinator, Member
from gptjax.distributed.report import check_same, code_hash

HOST = socket.gethostname()
KNOWN = b"what the processes of a run know"
ANOTHER = b"what the processes of another know"


class Met:
    """Some processes of a run, in threads, and the sentences that would have ended them."""

    def __init__(self, stack: contextlib.ExitStack, count: int, there: int | None = None):
        self.coordinator = stack.enter_context(
            contextlib.closing(Coordinator(count, KNOWN, "127.0.0.1"))
        )
        self.address = f"localhost:{self.coordinator.port}"
        self.ended: list[queue.Queue[str]] = [queue.Queue() for _ in range(count)]
        self.members = [self.join(index, count) for index in range(there or count)]
        for member in self.members:
            stack.callback(member.close)
        self._threads = stack.enter_context(ThreadPoolExecutor(count))

    def join(self, index: int, count: int, secret: bytes = KNOWN) -> Member:
        return Member(ProcessInfo(index, count, self.address, secret), 5, self.ended[index].put)

    def each(self, do) -> list:
        """What `do(member)` gives for every member, all at the same time."""
        return list(self._threads.map(do, self.members))


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def test_all_get_what_each_brought_in_the_order_of_processes(stack):
    met = Met(stack, 3)
    values = met.each(lambda member: member.gather("a barrier", member.process.index * 10, 5))
    assert values == [[0, 10, 20]] * 3
    assert met.each(lambda member: member.gather("a barrier", None, 5)) == [[None] * 3] * 3


def test_who_does_not_come_is_named(stack):
    met = Met(stack, 4, there=2)

    def wait(member: Member) -> str:
        with pytest.raises(InputError) as error:
            member.gather("the start", None, 0.3)
        return str(error.value)

    assert met.each(wait) == ["Process 2 and process 3 of 4 did not reach the start in 0.3 s."] * 2


def test_who_is_there_and_does_not_come_is_named_with_its_host(stack):
    met = Met(stack, 2)
    with pytest.raises(InputError, match=rf"Process 1 on {HOST} of 2 did not reach lunch"):
        met.members[0].gather("lunch", None, 0.2)


def test_one_that_was_started_as_one_of_others_is_named(stack):
    met = Met(stack, 2, there=1)
    stranger = met.join(1, 3)
    stack.callback(stranger.close)
    sentence = f"Process 1 on {HOST} was started as one of 3, process 0 on {HOST} as one of 2."
    for member in (stranger, met.members[0]):
        with pytest.raises(InputError) as error:
            member.gather("the start", None, 5)
        assert str(error.value) == sentence


def test_one_that_is_there_twice_is_named(stack):
    met = Met(stack, 3, there=2)
    twin = met.join(1, 3)
    stack.callback(twin.close)
    with pytest.raises(InputError, match=rf"Process 1 on {HOST} was started twice"):
        twin.gather("the start", None, 5)


def test_a_twin_that_comes_later_is_refused_and_the_run_goes_on(stack):
    met = Met(stack, 2)
    met.each(lambda member: member.gather("the start", None, 5))
    twin = met.join(1, 2)
    stack.callback(twin.close)
    with pytest.raises(InputError, match=rf"Process 1 on {HOST} was started twice"):
        twin.gather("the start", None, 5)
    assert met.each(lambda member: member.gather("a barrier", 1, 5)) == [[1, 1]] * 2
    assert all(ended.empty() for ended in met.ended)


STRANGERS = {
    "a browser": b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
    "no bytes": b"",
    "who knows the messages": bytes(64) + b'{"index": 1, "count": 2, "host": "x"}\n',
    "who stops a run": bytes(64) + b'{"kind": "stop", "number": 15}\n',
}


def test_strangers_on_the_port_are_refused_named_and_disturb_nobody(stack, capsys):
    met = Met(stack, 2)
    for words in STRANGERS.values():
        with socket.create_connection(("127.0.0.1", met.coordinator.port)) as other:
            other.sendall(words)
            other.shutdown(socket.SHUT_WR)
            assert len(other.makefile("rb").read()) == 32  # The challenge, and nothing else.
    assert met.each(lambda member: member.gather("the start", 1, 5)) == [[1, 1]] * 2
    assert all(ended.empty() for ended in met.ended)
    assert met.members[0].agreed_stop(7, None) is None
    assert capsys.readouterr().err == (
        "A connection from 127.0.0.1 was refused: it does not know this run's GPTJAX_SECRET.\n"
    )


def test_a_stranger_who_says_nothing_is_not_waited_for(stack, monkeypatch):
    monkeypatch.setattr("gptjax.distributed.handshake.SECONDS", 0.1)
    met = Met(stack, 2)
    with socket.create_connection(("127.0.0.1", met.coordinator.port), timeout=5) as other:
        assert len(other.makefile("rb").read()) == 32


def test_a_process_with_another_secret_is_refused_at_both_ends(stack, capsys):
    met = Met(stack, 2, there=1)
    sentence = (
        rf"Process 1 of 2 is refused by the process at {met.address}: GPTJAX_SECRET must be the "
        "same for all processes of a run."
    )
    with pytest.raises(InputError, match=sentence):
        met.join(1, 2, ANOTHER)
    assert "GPTJAX_SECRET" in capsys.readouterr().err
    with (
        contextlib.closing(Coordinator(2, ANOTHER)) as other,
        pytest.raises(InputError, match="is refused by"),
    ):
        Member(ProcessInfo(1, 2, f"localhost:{other.port}", KNOWN), 5, met.ended[1].put)


def test_an_answer_cannot_be_sent_back_as_ones_own(stack, monkeypatch):
    """Who listens in place of process 0 and knows nothing gets no process to believe it."""

    def mirror(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(bytes(32))
            connection.sendall(connection.recv(64)[32:])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=mirror, args=[listener])
        thread.start()
        address = f"localhost:{listener.getsockname()[1]}"
        with pytest.raises(InputError, match="is refused by"):
            Member(ProcessInfo(1, 2, address, KNOWN), 5, lambda _: None)
        thread.join()


def test_process_0_listens_where_the_others_come_and_nowhere_else(monkeypatch):
    resolved = {"localhost": "127.0.0.1", "own": "127.0.0.3", "far": "192.0.2.1"}

    def getaddrinfo(host, *_):
        return [(None, None, None, "", (resolved[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert interface("localhost:1") == "127.0.0.1"
    # Debian's hosts file has such an address for the machine's own name; others do not reach it.
    assert interface("own:1") == ""
    assert interface("far:1") == ""  # A forwarded port: it is no address of this machine.
    monkeypatch.undo()
    assert interface("127.0.0.2:1") == "127.0.0.2"
    assert interface("no such host:1") == ""
    with contextlib.closing(Coordinator(1, KNOWN, interface("127.0.0.2:1"))) as coordinator:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", coordinator.port), timeout=5)
        with socket.create_connection(("127.0.0.2", coordinator.port), timeout=5) as reached:
            reached.shutdown(socket.SHUT_WR)
            assert len(reached.makefile("rb").read()) == 32


def test_the_others_hear_at_once_that_one_has_ended(stack):
    met = Met(stack, 3)
    met.each(lambda member: member.gather("the start", None, 5))
    met.members[2]._connection.shutdown(socket.SHUT_RDWR)  # As the kernel does for a dead process.
    for ended in met.ended[:2]:
        assert ended.get(timeout=2) == f"Process 2 on {HOST} exited without notice"


def test_all_hear_that_process_0_has_ended(stack, monkeypatch):
    monkeypatch.setattr("gptjax.distributed.membership.NOTICE_SECONDS", 0.1)
    met = Met(stack, 2)
    met.coordinator.close()
    assert met.ended[1].get(timeout=2) == (
        f"Process 0, the coordinator at {met.address}, exited without notice"
    )


def test_who_leaves_with_a_mistake_gives_the_others_time_for_the_same(stack, monkeypatch):
    monkeypatch.setattr("gptjax.distributed.membership.GRACE_SECONDS", 0.3)
    met = Met(stack, 2)
    met.members[1].leave("its disk is full.")
    met.members[1].close()
    with pytest.raises(queue.Empty):
        met.ended[0].get(timeout=0.1)
    assert met.ended[0].get(timeout=2) == f"Process 1 on {HOST} stopped: its disk is full"


def test_a_failed_collective_is_blamed_on_who_left(stack):
    met = Met(stack, 2)
    met.members[1].leave("its disk is full.")
    met.members[0].blame()
    assert met.ended[0].get(timeout=1) == f"Process 1 on {HOST} stopped: its disk is full"


def test_after_the_end_nobody_is_missed(stack):
    met = Met(stack, 2)
    met.each(lambda member: member.gather(END, None, 5))
    met.members[1].close()
    with pytest.raises(queue.Empty):
        met.ended[0].get(timeout=0.2)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_all_stop_at_the_same_step_whoever_got_the_signal(stack, ahead):
    met = Met(stack, 3)
    steps = threading.Barrier(3)

    def train(member: Member) -> tuple[int, int | None]:
        for step in range(1, 200):
            if step % 3 == 0:  # As collectives do, which let processes drift by a few steps.
                steps.wait(timeout=5)
            time.sleep(0.001 * ((member.process.index + ahead) % 3))
            caught = signal.SIGTERM if member.process.index == 1 and step >= 20 else None
            if stop := member.agreed_stop(step, caught):
                return step, stop
        return 0, None

    stopped = met.each(train)
    assert len(set(stopped)) == 1
    step, number = stopped[0]
    assert 20 < step < 40
    assert number == signal.SIGTERM


def test_one_process_is_alone_without_anything_around_it(monkeypatch):
    for name in ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with distributed.joined():
        assert distributed.is_first()
        assert distributed.meet("a barrier", 3) == [3]
        assert distributed.agreed_stop(7, None) is None
        assert distributed.agreed_stop(7, signal.SIGINT) == signal.SIGINT


@pytest.mark.parametrize("known", [True, False])
def test_a_tpu_host_that_is_alone_goes_on_alone(monkeypatch, known):
    asked = []

    def initialize(**options) -> None:
        asked.append(options)
        if not known:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed, "has_tpu", lambda _: True)
    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with distributed.joined():
        assert distributed.is_first()
    assert asked == [{"initialization_timeout": 300}]


def test_tpu_chips_are_used_where_there_are_some_and_jax_may(monkeypatch):
    monkeypatch.setattr("pathlib.Path.glob", lambda folder, _: iter([folder / "0"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert has_tpu({})
    assert has_tpu({"JAX_PLATFORMS": "tpu,cpu"})
    assert not has_tpu({"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not has_tpu({})


SECRET = {"GPTJAX_SECRET": KNOWN.decode()}
EXPLICIT = {
    **SECRET,
    "JAX_COORDINATOR_ADDRESS": "gpu003:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
SLURM = {
    **SECRET,
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "1",
}
OPEN_MPI = {**SECRET, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, None),
        (EXPLICIT, ProcessInfo(2, 4, "gpu003:1234", KNOWN)),
        (SLURM, ProcessInfo(1, 3, "gpu003:22442", KNOWN)),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "ib3:7"}, None),
        ({**SLURM, **EXPLICIT}, ProcessInfo(2, 4, "gpu003:1234", KNOWN)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, None),  # The script that sbatch starts.
        ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "a:1"}, ProcessInfo(1, 2, "a:1", KNOWN)),
        ({**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_the_environment_tells_which_process_this_is(environment, process):
    if environment.get("JAX_COORDINATOR_ADDRESS") == "ib3:7":
        process = ProcessInfo(1, 3, "ib3:7", KNOWN)
    assert find_process(environment) == process


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_COORDINATOR_ADDRESS is set, but not JAX_PROCESS_ID and JAX_NUM_PROCESSES: set all "
            "three or none.",
        ),
        (
            {**EXPLICIT, "JAX_PROCESS_ID": "4"},
            "JAX_PROCESS_ID is 4: it must be below JAX_NUM_PROCESSES, which is 4.",
        ),
        (
            {**EXPLICIT, "JAX_PROCESS_ID": "two"},
            "JAX_PROCESS_ID is 'two': it must be a whole number.",
        ),
        (
            {**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "gpu003"},
            "JAX_COORDINATOR_ADDRESS is 'gpu003': it must be HOST:PORT.",
        ),
        (
            {**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "gpu003:65536"},
            "JAX_COORDINATOR_ADDRESS is 'gpu003:65536': it must be HOST:PORT.",
        ),
        (
            {**SLURM, "SLURM_STEP_NODELIST": ""},
            "SLURM_STEP_NODELIST is '': it must name the hosts of the step.",
        ),
        (
            {name: value for name, value in SLURM.items() if name != "SLURM_JOB_ID"},
            "SLURM_JOB_ID is '': it must be a whole number.",
        ),
        (
            {**EXPLICIT, "GPTJAX_SECRET": "too short"},
            "GPTJAX_SECRET has 9 characters: all processes of a run need the same one, of at least "
            "16 characters that nobody else knows.",
        ),
        (
            {name: value for name, value in SLURM.items() if name != "GPTJAX_SECRET"},
            "GPTJAX_SECRET is not set: all processes of a run need the same one, of at least 16 "
            "characters that nobody else knows.",
        ),
        (
            OPEN_MPI,
            "Open MPI started this, but JAX_COORDINATOR_ADDRESS is not set: mpirun -x "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT with the host of rank 0.",
        ),
    ],
)
def test_an_environment_that_makes_no_sense_is_a_sentence(environment, message):
    with pytest.raises(InputError) as error:
        find_process(environment)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,login", "gpu7"),
        ("gpu[003-005,9],login", "gpu003"),
        ("gpu[12,15]", "gpu12"),
        ("rack[1-2]-gpu[3-4],x", "rack1-gpu3"),
    ],
)
def test_the_first_of_slurms_hosts(nodes, first):
    assert first_host(nodes) == first


def test_what_differs_is_named_by_process_host_and_field():
    reports = [
        {"versions": {"jax": "0.10.2"}, "code": "a", "config": {"train": {"steps": 20}}},
        {"versions": {"jax": "0.10.2"}, "code": "a", "config": {"train": {"steps": 20}}},
        {"versions": {"jax": "0.10.1"}, "code": "b", "config": {"train": {"steps": 30}}},
    ]
    check_same("the same code", ["one", "two"], reports[:2])
    with pytest.raises(InputError) as error:
        check_same("the same code", ["one", "two", "three"], reports)
    assert str(error.value) == (
        "All processes need the same code of process 0 on one, but process 2 on three has "
        "versions.jax: 0.10.2 -> 0.10.1; code: a -> b; config.train.steps: 20 -> 30."
    )


def test_the_hash_of_the_code_sees_every_module(tmp_path):
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "a.py").write_text("a = 1\n")
    first = code_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert code_hash(tmp_path) == first
    (tmp_path / "layers" / "a.py").write_text("a = 2\n")
    second = code_hash(tmp_path)
    (tmp_path / "layers" / "a.py").rename(tmp_path / "a.py")
    assert len({first, second, code_hash(tmp_path)}) == 3


def test_a_coordinator_that_cannot_be_reached_is_a_sentence_in_time(command, monkeypatch):
    address = f"localhost:{free_port()}"
    for name, value in {**EXPLICIT, "JAX_COORDINATOR_ADDRESS": address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPTJAX_START_SECONDS", "1")
    start = time.monotonic()
    code, printed, errors = command("doctor")
    assert time.monotonic() - start < 3
    assert (code, printed) == (2, "")
    assert errors == (
        f"Process 2 of 4 cannot reach the coordinator, process 0 at {address}, in 1 s: connection "
        "refused.\n"
    )


@pytest.mark.parametrize("seconds", ["0", "soon", "-1"])
def test_a_time_limit_that_makes_no_sense_is_a_sentence(command, monkeypatch, seconds):
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPTJAX_START_SECONDS", seconds)
    assert command("doctor")[::2] == (
        2,
        f"GPTJAX_START_SECONDS is '{seconds}': it must be a whole number above 0.\n",
    )


def test_a_port_that_is_taken_is_a_sentence():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(InputError, match=r"cannot listen on port \d+: [Aa]ddress already in use"),
    ):
        Coordinator(2, KNOWN, port=taken.getsockname()[1])


def test_doctor_prints_a_page_for_a_bug_report(command):
    code, printed, errors = command("doctor")
    assert (code, errors) == (0, "")
    for word in ("python", "jaxlib", "flax", "optax", f"code     {code_hash()[:12]}", "system"):
        assert word in printed
    assert printed.endswith(f"process 0 of 1: 8 × cpu on {HOST}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--local", "0", "a.py"), "--local is 0: it must be at least 1."),
        (("--devices", "0", "a.py"), "--devices is 0: it must be at least 1."),
        (("--local", "2", "no/such.py", "--x"), "launch: there is no script no/such.py."),
        (("--local", "two", "a.py"), "two"),
        (("--local", "2"), "Missing from gptjax launch: SCRIPT An experiment"),
        (("--lokal", "2", "a.py"), "Unknown flag --lokal: did you mean --local?"),
    ],
)
def test_a_launch_that_makes_no_sense_is_a_sentence(command, words, message):
    code, printed, errors = command("launch", *words)
    assert (code, printed) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
