"""Programs that nobody has read: what they may do, what ends them, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tiers import LONG, only_long

from raygym.sandbox import run
from raygym.sandbox.run import Limits, Outcome, SandboxError, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
PATIENT = Limits(wall_s=60.0)


def namespaces_work() -> bool:
    code = "from raygym.sandbox import jail; jail.enter_namespaces()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(not namespaces_work(), reason="the kernel permits no namespaces here")
both = pytest.mark.parametrize(
    "namespaces",
    [
        pytest.param(True, marks=needs_namespaces, id="namespaces"),
        # In `make test` only where namespaces do not work.
        pytest.param(False, marks=[only_long] * namespaces_work(), id="without"),
    ],
)


# In the command line of every supervisor of these tests, and of what it forks: other tests may run beside them.
BOOT = f"{run._BOOT}  # {secrets.token_hex(8)}"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary directories of programs go here, and must be gone after each test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(run, "_BOOT", BOOT)
    yield tmp_path
    assert not list(tmp_path.iterdir())


def supervisors() -> list[int]:
    """The supervisors and programs of these tests that are there now."""
    found = []
    for path in Path("/proc").iterdir():
        # Gone since it was listed, perhaps.
        with suppress(OSError):
            if path.name.isdigit() and run._BOOT.encode() in (path / "cmdline").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


async def until(condition, timeout_s: float = 60.0) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


@both
async def test_what_a_program_did(namespaces):
    calls = [("double", [4]), ("double", [[1, "é"]]), ("double", [None]), ("missing", [])]
    source = (
        "import sys\nprint('out')\nprint('err', file=sys.stderr)\ndef double(x):\n    print('in', x)\n    return x * 2"
    )
    outcome = await run_program(source, calls, namespaces=namespaces)
    assert (outcome.ended, outcome.code, outcome.describe()) == ("exit", 0, "")
    assert outcome.output == "out\nerr\nin 4\nin [1, 'é']\nin None\n"
    assert outcome.results == (
        {"value": 8},
        {"value": [1, "é", 1, "é"]},
        {"error": "TypeError: unsupported operand type(s) for *: 'NoneType' and 'int'"},
        {"error": "NameError: the program defines no missing"},
    )


EXITS = [
    ("import sys; sys.exit(7)", 7, ""),
    ("import sys; sys.exit('bad')", 1, "bad\n"),
    ("raise SystemExit", 0, ""),
    ("import os; os._exit(300 % 256)", 44, ""),
    ("x = (", 1, "SyntaxError"),
    ("\x00", 1, "null bytes"),
    ("'\ud800'", 1, "surrogates"),
    ("raise KeyError('a')", 1, "KeyError: 'a'\n"),
    ("class E(Exception):\n    def __str__(self): raise E\nraise E", 1, "E"),
    ("import sys; sys.stdout = sys.stderr = None; 1 / 0", 1, ""),
    (r"print('\udc80')", 0, r"\udc80"),
    ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nprint(A(1))", 0, "A(x=1)\n"),
    ("def f(): return f()\nf()", 1, "RecursionError"),
]


@both
async def test_exit_codes(namespaces):
    outcomes = await asyncio.gather(*(run_program(source, namespaces=namespaces) for source, _, _ in EXITS))
    for outcome, (_, code, said) in zip(outcomes, EXITS, strict=True):
        assert (outcome.ended, outcome.code) == ("exit", code), outcome
        assert said in outcome.output, outcome
        assert "raygym" not in outcome.output


@pytest.mark.slow
@both
async def test_limits(namespaces):
    async def ended(source: str, limits: Limits = PATIENT, calls: Sequence[tuple[str, list[int]]] = ()) -> Outcome:
        return await run_program(source, calls, limits, namespaces=namespaces)

    ignoring = "import signal\nfor s in (15, 2, 24, 1): signal.signal(s, signal.SIG_IGN)\nprint('first')\n"
    found = await asyncio.gather(
        ended(ignoring + "while True: pass"),
        # It must have printed by then, beside all the others.
        ended(ignoring + "import time; time.sleep(60)", Limits(wall_s=6.0)),
        ended("x = 'a' * 2**31"),
        ended("x = []\nwhile True: x.append(bytearray(2**20))"),
        ended("while True: print('x' * 1000)"),
        ended("open('a', 'w').write('x' * 2**21)"),
        ended("def f(n):\n    while n: pass\n    return n", PATIENT, [("f", [0]), ("f", [1]), ("f", [0])]),
        ended("files = [open(str(i), 'w') for i in range(100)]"),
    )
    assert [outcome.ended for outcome in found] == ["cpu", "wall", "exit", "exit", "output", "exit", "cpu", "exit"]
    assert [outcome.describe() for outcome in found[:2]] == ["used too much processor time", "took too long"]
    assert found[0].output == found[1].output == "first\n"
    assert "MemoryError" in found[2].output and "MemoryError" in found[3].output
    assert 0 < len(found[4].output) <= 64 * 1024
    assert "File too large" in found[5].output or "No space" in found[5].output
    assert found[6].results == ({"value": 0},)
    assert "Too many open files" in found[7].output


@both
async def test_results_are_output_too(namespaces):
    calls = [("f", [10]), ("f", [2**20]), ("f", [10])]
    outcome = await run_program("def f(n): return 'x' * n", calls, namespaces=namespaces)
    assert (outcome.ended, outcome.results[0]) == ("output", {"value": "x" * 10})
    assert outcome.describe() == "printed too much"


REFUSED = [
    "import os; os.fork()",
    "import os; os.system('true')",
    "import subprocess; subprocess.run(['true'])",
    "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "import os; os.execv('/bin/true', ['true'])",
    "import os; os.kill(os.getppid(), 9)",
    "import os; os.killpg(0, 9)",
    "import _socket; _socket.socket()",
    "import _socket; _socket.getaddrinfo('localhost', 80)",
    "import _socket; _socket.socket(_socket.AF_UNIX).connect('/run/x')",
    "open('/etc/hostname')",
    "open('/proc/1/environ')",
    "open('../x', 'w')",
    "open('/var/tmp/x', 'w')",
    "import os; os.open('/var/tmp/x', os.O_CREAT | os.O_RDWR)",
    "import os; os.mkdir('/var/tmp/raygym-test')",
    "import os; os.symlink('/etc/hostname', 'link'); open('link')",
    "import os; os.listdir('/')",
    "import os; os.chdir('/')",
    "import os; os.remove(os.__file__)",
    "import os; open(os.__file__, 'a')",
]


@both
async def test_refused_in_words(namespaces):
    source = f"""
for source in {REFUSED!r}:
    try:
        exec(source)
        print("done")
    except BaseException as error:
        print(repr(error))
"""
    outcome = await run_program(source, namespaces=namespaces)
    assert (outcome.ended, outcome.code) == ("exit", 0), outcome
    said = outcome.output.splitlines()
    assert len(said) == len(REFUSED), outcome.output
    for source, line in zip(REFUSED, said, strict=True):
        # Without namespaces, only what was imported before can be imported, where the library is another user's.
        lacking = not namespaces and "import" in source and line.startswith("ModuleNotFoundError")
        assert line.startswith("PermissionError('not allowed here: ") or lacking, (source, line)


def test_the_audit_hook_stops_ordinary_network_code(tmp_path):
    """Alone, with the whole library at hand: against a server that is really there."""
    attempts = [
        "import socket; socket.create_connection(address)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', address)",
        "import socket; socket.getaddrinfo(*address)",
        "import urllib.request; urllib.request.urlopen('http://%s:%s' % address)",
        "import http.client; http.client.HTTPConnection(*address).request('GET', '/')",
        "import asyncio; asyncio.run(asyncio.open_connection(*address))",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing; multiprocessing.get_context('fork').Process(target=print).start()",
        "import ctypes; ctypes.CDLL(None)",
        "import os, shutil; shutil.copy(os.__file__, '/var/tmp/raygym-test')",
        "import tempfile; tempfile.mkdtemp(dir='/var/tmp')",
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
import sys
from raygym.sandbox import jail
address = {server.getsockname()!r}
import socket; socket.create_connection(address).close()
sys.addaudithook(jail.audit_hook({str(tmp_path)!r}, False))
for source in {attempts!r}:
    try:
        exec(source, dict(address=address))
        print("done")
    except Exception as error:
        print(type(error).__name__, error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    said = done.stdout.splitlines()
    assert len(said) == len(attempts), (done.stdout, done.stderr)
    for attempt, line in zip(attempts, said, strict=True):
        assert "not allowed here: " in line, (attempt, line)


@both
async def test_environment_directory_and_user(namespaces):
    source = """
import os
with open('note', 'w') as file: file.write('hello')
os.mkdir('d'); os.rename('note', 'd/note')
print(dict(os.environ), os.listdir(), open('d/note').read(), os.getuid(), os.geteuid(), os.getgroups())
"""
    outcome = await run_program(source, namespaces=namespaces)
    user = 65534 if os.getuid() == 0 else os.getuid()
    assert outcome.output.startswith(f"{{}} ['d'] hello {user} {user} ["), outcome.output
    again = await run_program("import os; print(os.listdir())", namespaces=namespaces)
    assert again.output == "[]\n"


@both
async def test_unremovable_files_are_removed(namespaces):
    source = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.chmod('a/b', 0); os.chmod('a', 0)"
    assert (await run_program(source, namespaces=namespaces)).code == 0  # the fixture looks at the directory


async def test_asyncio_works_inside():
    outcome = await run_program("import asyncio\nasync def f(): return 5\nprint(asyncio.run(f()))")
    if outcome.output != "5\n":
        assert "No module named" in outcome.output and not namespaces_work()


@only_long
@pytest.mark.slow
@both
async def test_children_are_counted_and_killed_with_it(namespaces):
    """With processes allowed: a fork bomb, and daemons that left the session and ignore signals."""
    limits = Limits(wall_s=1.0, processes=True)
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    daemon = """
import os, signal, time
for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(s, signal.SIG_IGN)
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
        os._exit(0)
time.sleep(0.1)
print(os.getpid())
"""
    seen: list[int] = []

    async def count() -> None:
        while True:
            seen.append(len(supervisors()))
            await asyncio.sleep(0.02)

    counting = asyncio.ensure_future(count())
    left = await run_program(daemon, limits=replace(limits, wall_s=30.0), namespaces=namespaces)
    assert (left.ended, left.code) == ("exit", 0) and left.output.strip().isdigit(), left
    assert not supervisors()
    bombed = await run_program(bomb, limits=limits, namespaces=namespaces)
    counting.cancel()
    assert bombed.ended in ("wall", "cpu")
    assert not supervisors()
    assert 4 <= max(seen) <= 70


@only_long
@pytest.mark.slow
async def test_nothing_is_left_after_many_runs():
    sources = [
        "print(1)",
        "import os; os._exit(3)",
        "import time; time.sleep(9)",
        "open('a', 'w').write('b')",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass",
    ]
    before = len(os.listdir("/proc/self/fd"))
    limits = Limits(wall_s=1.5, processes=True)
    runs = [run_program(sources[i % len(sources)], limits=limits) for i in range(200 if LONG else 20)]
    outcomes = await asyncio.gather(*runs)
    assert {outcome.ended for outcome in outcomes} == {"exit", "wall"}
    assert not supervisors()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@both
async def test_cancelling_kills(namespaces):
    running = asyncio.ensure_future(
        run_program("import time; time.sleep(60)", limits=Limits(60), namespaces=namespaces)
    )
    await until(lambda: len(supervisors()) == 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not supervisors())


@both
async def test_the_end_of_the_asking_process_kills(namespaces, directory):
    code = (
        "import asyncio, tempfile; from raygym.sandbox import run; from raygym.sandbox.run import *\n"
        f"run._BOOT = {BOOT!r}\n"
        f"tempfile.tempdir = {str(directory)!r}\n"
        f"asyncio.run(run_program('import time; time.sleep(60)', limits=Limits(60), namespaces={namespaces}))"
    )
    asking = subprocess.Popen([sys.executable, "-c", code])
    await until(lambda: len(supervisors()) == 2)
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    await until(lambda: not supervisors() and not list(directory.iterdir()))


# The later one is killed before the program's process has asked to be killed with it.
SLOW_TO_SHUT_IN = (
    "import time; from raygym.sandbox import jail; do = jail.become_nobody; "
    "jail.become_nobody = lambda: (time.sleep(0.5), do()); "
)


@both
@pytest.mark.parametrize("slow", ["", SLOW_TO_SHUT_IN], ids=["at once", "slowly"])
async def test_the_end_of_the_supervisor_is_an_error_and_kills(directory, namespaces, slow, monkeypatch):
    monkeypatch.setattr(run, "_BOOT", BOOT.replace("main()", slow + "main()"))
    running = asyncio.ensure_future(
        run_program("import time; time.sleep(60)", limits=Limits(60), namespaces=namespaces)
    )
    await until(lambda: len(supervisors()) == 2)
    os.kill(min(supervisors()), signal.SIGKILL)
    with pytest.raises(SandboxError, match="ended with status -9"):
        await running
    await until(lambda: not supervisors())
    for left in directory.iterdir():  # nobody was there to do it
        left.rmdir()


@only_long
@pytest.mark.slow
async def test_bounded_concurrency_that_does_not_count_against_the_program():
    limits = Limits(wall_s=60.0)
    count = 3 * run._AT_ONCE
    started = time.monotonic()
    outcomes = await asyncio.gather(
        *(run_program("import time; time.sleep(0.15)", limits=limits) for _ in range(count))
    )
    assert time.monotonic() - started >= 3 * 0.15
    assert [outcome.ended for outcome in outcomes] == ["exit"] * count


def test_other_event_loops():
    uvloop = pytest.importorskip("uvloop")
    for _ in range(2):
        assert uvloop.run(run_program("print(3)")).output == "3\n"


@both
def test_what_the_asking_process_ignores_and_blocks_does_not_matter(namespaces, directory):
    """From a thread of a process that leaves its children to the kernel, as a worker's event loop may run."""
    code = f"""
import asyncio, signal, tempfile, threading
from raygym.sandbox.run import *
tempfile.tempdir = {str(directory)!r}
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGCHLD, signal.SIGTERM}})
source = "import time; time.sleep(0.1); print(7); raise SystemExit(3)"
async def main(): print(await run_program(source, namespaces={namespaces}))
threading.Thread(target=lambda: asyncio.run(main())).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "Outcome(ended='exit', code=3, output='7\\n', results=())\n", done.stderr


async def test_without_namespaces_a_warning_comes_once(monkeypatch, caplog):
    real, asked = run._supervised, []

    async def refusing(request, wall_s):
        asked.append(request["namespaces"])
        if request["namespaces"]:
            return {"ended": "not jailed", "detail": "unshare: Operation not permitted"}
        return await real(request, wall_s)

    monkeypatch.setattr(run, "_supervised", refusing)
    monkeypatch.setattr(run, "_namespaces_work", True)
    for _ in range(2):
        assert (await run_program("print(1)")).output == "1\n"
    assert asked == [True, False, False]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "programs run without namespaces (unshare"
    ]


async def test_no_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SandboxError, match="could not be started"):
        await run_program("")


@pytest.mark.parametrize("kwargs", [{"wall_s": 0}, {"cpu_s": -1}, {"memory_mib": 0}])
def test_limits_refuse(kwargs):
    with pytest.raises(ValueError, match="expected more than 0"):
        Limits(**kwargs)


@needs_namespaces
def test_the_kernel_holds_without_the_audit_hook(directory):
    """The jail alone, tried by code that no hook watches."""
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory(dir="/tmp") as root:
        port = server.getsockname()[1]
        code = f"""
import errno, json, os, socket, sys
from raygym.sandbox import jail
socket.create_connection(("127.0.0.1", {port})).close()
os.umask(0o022)
jail.enter_namespaces()
pid = os.fork()
if pid:
    os.waitpid(pid, 0)
    sys.exit()
jail.change_root({root!r}, 1 << 20)
jail.become_nobody()
jail.set_limits(dict(cpu_s=5, memory_mib=4000, file_mib=100, processes=1))
def attempt(call):
    try:
        return call() and "done"
    except OSError as error:
        return errno.errorcode[error.errno]
def fill():
    for i in range(100):
        with open(f"/tmp/{{i}}", "wb") as file: file.write(b"x" * 50_000)
print(json.dumps([
    attempt(lambda: socket.create_connection(("127.0.0.1", {port}), 1)),
    attempt(lambda: open("/etc/passwd")),
    attempt(lambda: open("/new", "w")),
    attempt(lambda: open(os.__file__, "a")),
    attempt(lambda: open("/usr/lib/new", "w")),
    attempt(lambda: jail.change_root("/tmp", 1)),
    attempt(lambda: os.chroot("/tmp")),
    attempt(lambda: os.setuid(0)),
    attempt(os.fork),
    attempt(lambda: os.kill({os.getpid()}, 0)),
    attempt(fill),
    set(os.listdir("/")) <= {{"dev", "proc", "tmp", "lib", "lib32", "lib64", "usr", os.__file__.split("/")[1]}},
    os.getpid(),
]))
os._exit(0 if sys.stdout.flush() is None else 1)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout, done.stderr
    refused = ["EPERM", "EACCES", "EROFS"]
    network, hidden, *writes = json.loads(done.stdout)
    assert network in ("ENETUNREACH", "ECONNREFUSED", "EADDRNOTAVAIL")
    assert hidden == "ENOENT"
    assert all(result in refused for result in writes[:6]), writes
    assert writes[6:] == ["EAGAIN", "ESRCH", "ENOSPC", True, 1]
