from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from havoc_core.adapt.sandbox import plain
from havoc_core.adapt.sandbox.process import Job, Outcome, Sandbox, SandboxLimits, enforced, run_functions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model-written code is confined on Linux only")
needs_filter = pytest.mark.skipif(platform.machine() != "x86_64", reason="the test's own filter knows x86_64 numbers")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(limits=SandboxLimits(wall_s=5.0), num_processes=4) as opened:
        yield opened


def run(sandbox, code, *calls, setup=""):
    return sandbox.run([Job(setup, textwrap.dedent(code), calls)])[0]


def value(outcome):
    assert outcome.status == "ok", outcome
    return outcome.values[0]


# What ordinary code may do


def test_values_come_back_with_their_types(sandbox):
    """Each call's value arrives as a fresh plain built-in of its own type."""
    outcome = run(sandbox, "def f(x):\n    return [x, (x,), {x}, {x: 1.5}]", "f(1)", "f('a')[0]", "f(True)[0]")
    assert outcome.values == ([1, (1,), {1}, {1: 1.5}], "a", True)
    assert type(outcome.values[2]) is bool


def test_calls_share_one_process_and_see_each_others_effects(sandbox):
    """Calls run in order in one namespace, and a value is taken before the next call can change it."""
    assert run(sandbox, "xs = []\ndef f():\n    xs.append(1)\n    return xs", "f()", "f()").values == ([1], [1, 1])


def test_setup_runs_after_the_code_as_mbpp_means_it(sandbox):
    """Test preparation may use what the code defines."""
    outcome = run(
        sandbox, "class Node:\n    def __init__(self, v):\n        self.v = v", "root.v", setup="root = Node(7)"
    )
    assert value(outcome) == 7


@pytest.mark.parametrize(
    "code",
    [
        "import math, re, heapq, itertools, functools, collections, bisect, string, operator, random, copy, cmath",
        "from typing import List\nfrom datetime import datetime\nfrom fractions import Fraction\nimport statistics",
        "from collections.abc import Iterable\nimport sys, os, time, json, array, enum, dataclasses, queue, threading",
        "'x'.encode('utf-16').decode('utf-16'); 'ä'.encode('idna')",
        "import datetime; datetime.datetime.strptime('2020-01-02', '%Y-%m-%d')",
        "x = 1\r\ny = 2\r\n",
    ],
)
def test_code_may_use_the_standard_library(sandbox, code):
    """Modules that small programs use are there although no file can be read."""
    assert run(sandbox, code).status == "ok"


def test_our_own_future_imports_do_not_leak_into_the_code(sandbox):
    """Annotations are evaluated as Python does by default, and a dataclass works."""
    code = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f() -> int: ..."
    assert value(run(sandbox, code, "f.__annotations__['return'] is int and P(3).x == 3")) is True


def test_a_main_guard_does_not_run(sandbox):
    """Code is imported, not run as a program."""
    assert run(sandbox, "if __name__ == '__main__':\n    raise ValueError").status == "ok"


def test_a_job_has_one_outcome():
    """Hash seed and `random` are fixed: two sandboxes give the same order and the same chance."""
    job = Job("", "import random", ("[random.random(), list({'ab', 'cd', 'ef', 'gh', 'ij'}), hash('x')]",))
    with Sandbox(num_processes=1) as first, Sandbox(num_processes=1) as second:
        assert first.run([job]) == second.run([job])


def test_jobs_do_not_see_each_other(sandbox):
    """What one job leaves behind is gone for the next."""
    run(sandbox, "import builtins, sys\nbuiltins.trace = 1\nsys.trace = 1")
    assert value(run(sandbox, "import builtins, sys", "hasattr(builtins, 'trace') or hasattr(sys, 'trace')")) is False


# What hostile code tries


FILES = "import os\nfor n in range(10000):\n    open(f'/tmp/fill{n}', 'w').write('x' * 1000000)"
ATTACKS = {
    "infinite loop": ("while True: pass", "timeout", ""),
    "sleep": ("import time; time.sleep(60)", "timeout", "within"),
    "stdout flood": ("while True: print('x' * 100000)", "timeout", ""),
    "stderr flood": ("import sys\nwhile True: sys.stderr.write('x' * 100000)", "timeout", ""),
    "10 GB at once": ("x = bytearray(10 * 2**30)", "error", "MemoryError"),
    "memory growth": ("x = []\nwhile True: x.append(bytearray(2**20))", "error", "MemoryError"),
    "fork bomb": ("import os\nwhile True: os.fork()", "error", "PermissionError"),
    "thread bomb": ("import threading\nwhile True: threading.Thread(target=print).start()", "error", "can't start"),
    "exec": ("import os; os.execv('/bin/true', ['true'])", "error", "PermissionError"),
    "subprocess": ("import os; os.system('true') and 1/0", "error", "ZeroDivisionError"),
    "kill parent": ("import os; os.kill(os.getppid(), 9)", "error", "PermissionError"),
    "kill everyone": ("import os; os.kill(-1, 9)", "error", "PermissionError"),
    "TCP": ("import socket; socket.create_connection(('127.0.0.1', 80))", "error", "Error"),
    "UDP": ("import _socket; _socket.socket(2, 2)", "error", "PermissionError"),
    "UNIX socket": ("import _socket; _socket.socket(1, 1)", "error", "PermissionError"),
    "socket pair": ("import _socket; _socket.socketpair()", "error", "PermissionError"),
    "read passwd": ("open('/etc/passwd').read()", "error", "PermissionError"),
    "parent's environment": ("import os; open(f'/proc/{os.getppid()}/environ').read()", "error", "PermissionError"),
    "read own memory map": ("open('/proc/self/maps').read()", "error", "PermissionError"),
    "list the root": ("import os; os.listdir('/')", "error", "PermissionError"),
    "stat a hidden file": ("import os; os.stat('/etc/passwd')", "error", "PermissionError"),
    "chmod": ("import os; os.chmod('/tmp', 0o777)", "error", "PermissionError"),
    "delete": ("import os; os.remove('/tmp/x')", "error", "PermissionError"),
    "many files": (FILES, "error", "PermissionError"),
    "memory file": ("import os; os.memfd_create('x')", "error", "PermissionError"),
    "raise limits": ("import resource; resource.setrlimit(0, (9, 9))", "error", "Error"),
    "recursion": ("def f(n): return f(n + 1)\nf(0)", "error", "RecursionError"),
    "recursion without Python's limit": (
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "error", "",
    ),
    "null pointer": ("import ctypes; ctypes.string_at(0)", "error", "signal 11"),
    "raw system call": ("import ctypes; assert ctypes.CDLL(None).syscall(57) == -1; 1/0", "error", "ZeroDivisionError"),
    "ptrace": ("import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == -1; 1/0", "error", "ZeroDivisionError"),
    "sys.exit": ("import sys; sys.exit(0)", "error", "SystemExit"),
    "os._exit": ("import os; os._exit(0)", "error", "exit code 0"),
    "abort": ("import os; os.abort()", "error", "signal"),
    "ignore the CPU signal": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "timeout", ""
    ),
    "unknown syntax": ("def f(:", "error", "SyntaxError"),
    "null byte": ("x = '\0'", "error", ""),
    "lone surrogate": ("x = '\ud800'", "error", "UnicodeEncodeError"),
    "nested parentheses": ("(" * 5000 + ")" * 5000, "error", ""),
    "huge power": ("x = 10 ** (10 ** 9)", "timeout", ""),
    "an exception that cannot be described": (
        "class E(Exception):\n    def __str__(self): raise self\nraise E", "error", "cannot be described"
    ),
    "a base exception": ("raise GeneratorExit", "error", "GeneratorExit"),
}  # fmt: skip


@pytest.fixture(scope="module")
def attacks(sandbox):
    """All attacks at once, beside an honest job, so the slow ones wait together."""
    said = sandbox.enforced
    if not all(said.values()):
        pytest.skip(f"attacks are run only where everything is enforced, here: {said}")
    jobs = [Job("", code, ("'reached the end'",)) for code, _, _ in ATTACKS.values()]
    outcomes = sandbox.run([*jobs, Job("", "def f(): return 1", ("f()",))])
    assert outcomes[-1].values == (1,)
    return dict(zip(ATTACKS, outcomes, strict=False))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_nothing_but_a_reason(attacks, name):
    """Each attack ends as "error" or "timeout" with the expected reason: no value, and never "infra"."""
    _, status, reason = ATTACKS[name]
    assert (attacks[name].status, attacks[name].values) == (status, ())
    assert reason in attacks[name].reason


def test_the_attacks_leave_the_confined_processes_alive(attacks, sandbox):
    """After all attacks an honest job still runs, in the same processes."""
    before = sandbox.process_ids
    assert value(run(sandbox, "def f(): return 'alive'", "f()")) == "alive"
    assert sandbox.process_ids == before


# What a cheat tries: the test it wants to pass is always `f(2) == 4`


CHEATS = {
    "object that equals everything": "class A:\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "int that equals everything": "class A(int):\n    def __eq__(self, o): return True\ndef f(x): return A(5)",
    "honest int subclass": "class A(int): pass\ndef f(x): return A(4)",
    "string that is a number": "def f(x): return '4'",
    "liar inside a list": "class A:\n    def __eq__(self, o): return True\ndef f(x): return [A()]",
    "metaclass that equals int": (
        "class M(type):\n    def __eq__(c, o): return True\n    def __hash__(c): return hash(int)\n"
        "class A(metaclass=M):\n    def __eq__(self, o): return True\ndef f(x): return A()"
    ),
    "sys.exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit in the call": "import os\ndef f(x): os._exit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 5",
    "printed verdict": 'def f(x):\n    print(\'{"status": "ok", "values": ["4"]}\')\n    return 5',
    "forged message without the nonce": (
        'import os\ndef f(x):\n    os.write(3, b\'{"status": "ok", "reason": "", "values": ["4"]}\')\n    os._exit(0)'
    ),
    "forged message with a guessed nonce": (
        'import os\nmessage = b\'0\' * 32 + b\'{"status": "ok", "reason": "", "values": ["4"]}\'\n'
        "def f(x):\n    for d in range(64):\n        try: os.write(d, message)\n        except OSError: pass\n"
        "    os._exit(0)"
    ),
    "forged message before an honest one": "import os\nos.write(3, b'x')\ndef f(x): return 4",
    "closed pipe": "import os, time\nos.close(3)\ntime.sleep(0.1)\ndef f(x): return 4",
    "patched builtins": "import builtins as b\nb.type = lambda x: int\nb.repr = lambda x: '4'\ndef f(x): return 5",
    "patched json": "import json\njson.dumps = lambda *a, **k: '4'\ndef f(x): return 5",
    "flood through the pipe": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "huge result": "def f(x): return 'x' * 10**6",
    "endless result": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "nothing": "",
}


@pytest.fixture(scope="module")
def cheats(sandbox):
    return dict(zip(CHEATS, sandbox.run([Job("", code, ("f(2)",)) for code in CHEATS.values()]), strict=True))


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_come_out_right(cheats, name):
    """None of the cheats gives the plain value 4, and none is taken for a failure of the sandbox."""
    outcome = cheats[name]
    assert outcome.status in {"ok", "error"}
    assert not (outcome.status == "ok" and outcome.values == (4,))


def test_a_result_that_is_not_plain_is_named(cheats):
    """The parent gets the type's name, not the object."""
    assert cheats["honest int subclass"].values == (plain.Opaque("A"),)


# Limits and layers


def test_the_sandbox_says_what_it_enforces_here():
    """`enforced` names every promise with a plain bool, and on this kernel at least one of the two layers holds."""
    said = enforced()
    names = {"files", "writes", "network", "processes", "signals", "memory", "landlock", "seccomp", "privileges"}
    assert set(said) == names
    assert all(type(value) is bool for value in said.values())
    assert said["landlock"] or said["seccomp"]
    assert said["memory"]


def test_limits_are_those_asked_for():
    """Memory, wall and output limits of a sandbox take effect."""
    with Sandbox(limits=SandboxLimits(memory_bytes=128 << 20, output_bytes=2000), num_processes=1) as small:
        jobs = [Job("", "x = bytearray(150 << 20)", ()), Job("", "", ("'x' * 1500",)), Job("", "", ("'x' * 500",))]
        assert [outcome.status for outcome in small.run(jobs)] == ["error", "error", "ok"]
    with Sandbox(limits=SandboxLimits(wall_s=0.2), num_processes=1) as short:
        assert run(short, "import time; time.sleep(60)").reason == "no result within 0.2 s"


def test_a_job_that_is_too_large_is_refused_before_it_is_sent(sandbox):
    """More than 1 MiB of code is an error, not a stuck pipe."""
    assert "larger than" in run(sandbox, "x = '" + "y" * (1 << 21) + "'").reason


def test_large_code_below_the_limit_runs(sandbox):
    """Requests larger than a socket buffer arrive whole."""
    assert run(sandbox, "x = '" + "y" * 900_000 + "'", "len(x)").values == (900_000,)


_LADDER = """
import ctypes, json, sys
from havoc_core.adapt.sandbox import confinement as c
from havoc_core.adapt.sandbox.process import Job, Sandbox
from havoc_core.errors import HavocError
ENOSYS, EINVAL = 0x00050026, 0x00050016
steps = [(0x20, 0, 0, 0)]
if "landlock" in sys.argv: steps += [(0x15, 0, 1, 444), (0x06, 0, 0, ENOSYS)]
if "seccomp" in sys.argv:  # prctl(PR_SET_SECCOMP): number, then the low half of its first argument
    steps += [(0x15, 0, 3, 157), (0x20, 0, 0, 16), (0x15, 0, 1, 22), (0x06, 0, 0, EINVAL)]
steps += [(0x06, 0, 0, 0x7FFF0000)]
code = (c._Instruction * len(steps))(*(c._Instruction(*s) for s in steps))
program = c._Program(len(steps), ctypes.cast(code, ctypes.POINTER(c._Instruction)))
assert c._prctl(38, 1) and c._prctl(22, 2, ctypes.addressof(program))
try:
    with Sandbox(num_processes=1, allow_unconfined="anyway" in sys.argv) as sandbox:
        outcome = sandbox.run([Job("", "def f(): return 1", ("f()",))])[0]
        print(json.dumps({"enforced": sandbox.enforced, "values": outcome.values}))
except HavocError as error:
    print(json.dumps({"refused": str(error)}))
"""


def on_a_kernel_without(*layers):
    """Run a sandbox below a filter of our own that makes the kernel deny it these layers."""
    import json

    command = [sys.executable, "-c", _LADDER, *layers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_filter
def test_without_landlock_seccomp_still_confines():
    """On a kernel without Landlock, the filter alone refuses everything, and `enforced` says which layer it is."""
    told = on_a_kernel_without("landlock")
    assert told["values"] == [1]
    assert not told["enforced"].pop("landlock")
    assert all(told["enforced"].values())


@needs_filter
def test_without_seccomp_landlock_still_hides_the_files():
    """On a kernel without seccomp, files stay closed, and `enforced` admits what does not hold."""
    told = on_a_kernel_without("seccomp")
    assert told["values"] == [1]
    said = told["enforced"]
    assert (said["landlock"], said["files"], said["writes"]) == (True, True, True)
    assert (said["seccomp"], said["network"]) == (False, False)


def test_a_child_that_closes_its_pipe_and_goes_on_is_stopped(sandbox):
    """Hiding from the reader is the code's fault: a timeout, not a failure of the sandbox."""
    with Sandbox(limits=SandboxLimits(wall_s=0.3), num_processes=1) as small:
        assert run(small, "import os, time\nos.close(3)\ntime.sleep(60)").status == "timeout"


@needs_filter
def test_without_both_nothing_is_run():
    """Neither layer: a clear refusal that says what is needed."""
    assert "neither Landlock nor seccomp" in on_a_kernel_without("landlock", "seccomp")["refused"]


@needs_filter
def test_without_both_it_runs_only_when_told_so():
    """`allow_unconfined` runs the code and `enforced` tells the truth about it."""
    told = on_a_kernel_without("landlock", "seccomp", "anyway")
    assert told["values"] == [1]
    assert not told["enforced"]["files"]
    assert not told["enforced"]["seccomp"]


# When the sandbox itself fails


def test_a_killed_process_is_replaced_and_the_job_retried():
    """A confined process that is gone costs nothing but time."""
    with Sandbox(num_processes=1) as sandbox:
        run(sandbox, "pass")
        os.kill(sandbox.process_ids[0], signal.SIGKILL)
        time.sleep(0.05)
        assert value(run(sandbox, "def f(): return 2", "f()")) == 2


def test_a_process_killed_twice_under_a_job_is_infra_and_not_remembered():
    """After two failures the job is "infra", which is no verdict, and it may be asked again."""
    job = Job("", "import time\ndef f():\n    time.sleep(0.9)\n    return 3", ("f()",))
    with Sandbox(num_processes=1) as sandbox:
        seen: set[int] = set()
        is_over = threading.Event()

        def kill_each_once():
            while not is_over.wait(0.1):
                for pid in set(sandbox.process_ids) - seen:
                    seen.add(pid)
                    os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=kill_each_once)
        thread.start()
        outcome = sandbox.run([job])[0]
        is_over.set()
        thread.join()
        assert (outcome.status, outcome.values, len(seen)) == ("infra", (), 2)
        assert sandbox.run([job])[0] == Outcome("ok", (3,))


def test_an_interrupted_run_leaves_no_answer_for_the_next():
    """Ctrl-C while code runs: the next job gets its own answer."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Sandbox(num_processes=2) as sandbox:
            sandbox.run([Job("", f"x = {n}", ()) for n in range(9)])
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                sandbox.run([Job("", f"import time; time.sleep({s})", ("'old'",)) for s in (1.0, 1.1)])
            assert value(run(sandbox, "def f(): return 'new'", "f()")) == "new"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_threads_may_share_a_sandbox(sandbox):
    """Each thread gets the answers to its own jobs."""
    answers: dict[int, tuple] = {}

    def work(n):
        answers[n] = sandbox.run([Job("", f"x = {n}", ("x",))])[0].values

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: (n,) for n in range(8)}


_FORKED = """
import os, sys, warnings
warnings.simplefilter("ignore")
from havoc_core.adapt.sandbox.process import Job, run_functions
ask = lambda n: run_functions([Job("", f"x = {n}", ("x",))])[0].values
assert ask(1) == (1,)
pid = os.fork()
if pid == 0:
    os._exit(0 if all(ask(100 + n) == (100 + n,) for n in range(20)) else 1)
assert all(ask(200 + n) == (200 + n,) for n in range(20))
assert os.waitpid(pid, 0)[1] == 0
assert ask(3) == (3,)
"""


def test_a_forked_copy_of_the_parent_gets_processes_of_its_own():
    """Parent and forked child do not read each other's answers."""
    done = subprocess.run([sys.executable, "-c", _FORKED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_confined_process_ends_with_its_parent():
    """A parent that dies without cleaning up leaves no process behind."""
    code = """
    import os, sys
    from havoc_core.adapt.sandbox.process import Sandbox, Job
    s = Sandbox(num_processes=1)
    s.run([Job("", "", ())])
    print(s.process_ids[0], flush=True)
    os._exit(0)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pid = int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}/exe").exists()


# Cost


def test_equal_jobs_run_once_and_are_remembered():
    """A verdict is asked for once: 300 equal jobs take about as long as one, and none the second time."""
    job = Job("", "import time\ntime.sleep(0.2)\ndef f(): return 1", ("f()",))
    with Sandbox(num_processes=1) as sandbox:
        start = time.monotonic()
        assert all(outcome.values == (1,) for outcome in sandbox.run([job] * 300))
        assert time.monotonic() - start < 5
        start = time.monotonic()
        sandbox.run([job])
        assert time.monotonic() - start < 0.1


def test_what_is_remembered_is_bounded(monkeypatch):
    """The memory of verdicts forgets the oldest."""
    from havoc_core.adapt.sandbox import process as module

    monkeypatch.setattr(module, "_MAX_REMEMBERED", 3)
    with Sandbox(num_processes=1) as sandbox:
        sandbox.run([Job("", f"x = {n}", ()) for n in range(10)])
        assert len(sandbox._remembered) == 3


def test_a_job_is_a_fork_and_not_a_new_interpreter(monkeypatch):
    """Starting Python costs ten times a fork, so once a confined process is there, jobs start no other program."""
    with Sandbox(num_processes=1) as sandbox:
        run(sandbox, "pass")

        def refuse(*_words, **_more):
            raise AssertionError("a job started a program")

        monkeypatch.setattr(subprocess, "Popen", refuse)
        assert [value(run(sandbox, f"def f(): return {n}", "f()")) for n in range(5)] == list(range(5))


def test_no_jobs_start_nothing():
    """An empty batch is an empty answer."""
    assert run_functions([]) == []


def test_the_room_does_not_load_torch():
    """Tasks, sandbox, sources and evaluation are edge code."""
    code = (
        "import sys\n"
        "from havoc_core.adapt.sandbox import process\n"
        "from havoc_core.adapt.tasks import assertions, sources, evaluation, names, task\n"
        "[task.load_task(d) for d in names.DOMAINS]\n"
        "heavy = {'torch', 'datasets', 'scipy', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
