"""Child processes: messages, errors, how an ended process is told of, and that nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from planish.optimizer.errors import BadInput, InternalError, OutOfResources
from planish.optimizer.system.child_process import Channel, ChildProcess, Message

SERVED = """
import os, signal, sys
import numpy as np
from planish.optimizer.errors import BadInput
from planish.optimizer.system.child_process import Message, serve

def answer(request):
    if request.name == "double":
        print("what a runtime prints")
        return Message("doubled", {"said": request.values["said"] * 2}, {n: a + a for n, a in request.arrays.items()})
    if request.name == "refuse":
        raise BadInput("it is bad", where="here", advice="mend it", picture="^")
    if request.name == "exhaust":
        raise MemoryError
    if request.name == "full":
        raise OSError(28, "No space left on device", "/tmp/x")
    if request.name == "break":
        raise KeyError("a bug")
    if request.name == "end":
        print("first line", file=sys.stderr)
        print("last words", file=sys.stderr, flush=True)
        if request.values["signal"] != signal.SIGKILL:
            signal.signal(request.values["signal"], signal.SIG_DFL)  # behind a shell's `&` SIGINT is ignored
        os.kill(os.getpid(), request.values["signal"])

def main():
    serve(answer)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that serves."""
    (tmp_path / "served_for_a_test.py").write_text(SERVED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return "served_for_a_test"


def wait_for_end(pid: int) -> None:
    """Until the process has ended, 30 s at most."""
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_values_and_arrays_go_there_and_back(module: str, capfd: pytest.CaptureFixture[str]) -> None:
    arrays: dict[str, np.ndarray] = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3).T,
        "nothing": np.zeros((0, 4), np.int64),
        "large": np.ones((1 << 20) + 1, np.float32),
    }
    with ChildProcess.start(module, "the process") as child:
        reply = child.request("double", arrays, said="ä")
        assert (reply.name, reply.values) == ("doubled", {"said": "ää"})
        assert reply.arrays.keys() == arrays.keys()
        for name, array in arrays.items():
            assert reply.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(reply.arrays[name], array + array)
        assert child.request("double", said="b").arrays == {}
    assert capfd.readouterr() == ("", "")


def test_modules_in_the_working_folder_are_not_imported(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "numpy.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with ChildProcess.start(module, "the process") as child:
        assert child.request("double", said="x").values == {"said": "xx"}


def test_an_error_is_raised_here_as_it_was_there_and_the_process_lives_on(module: str) -> None:
    with ChildProcess.start(module, "the process") as child:
        with pytest.raises(BadInput) as caught:
            child.request("refuse")
        error = caught.value
        assert (error.what, error.where, error.advice, error.picture) == ("it is bad", "here", "mend it", "^")
        with pytest.raises(OutOfResources, match="memory ran out"):
            child.request("exhaust")
        with pytest.raises(OutOfResources, match="/tmp/x: there is no room to write"):
            child.request("full")
        assert child.request("double", said="x").values == {"said": "xx"}


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        (signal.SIGKILL, OutOfResources, r"out: the process ended \(signal 9\): last words"),
        (signal.SIGSEGV, InternalError, r"out: the process ended \(signal 11\): last words"),
        (signal.SIGINT, KeyboardInterrupt, None),
        (signal.SIGTERM, KeyboardInterrupt, None),
    ],
)
def test_how_a_process_ended_is_told(
    how: signal.Signals, kind: type[BaseException], told: str | None, module: str
) -> None:
    with ChildProcess.start(module, "the process", where="out") as child, pytest.raises(kind, match=told):
        child.request("end", signal=how)


def test_a_bug_is_told_by_its_last_line(module: str) -> None:
    with ChildProcess.start(module, "the process") as child:
        with pytest.raises(InternalError, match=r"the process ended \(exit code 1\): KeyError: 'a bug'"):
            child.request("break")
        with pytest.raises(InternalError, match="exit code 1"):  # and once more, for who asks again
            child.request("double", {"x": np.zeros(1 << 20)}, said="x")


def test_a_process_that_is_killed_before_it_reads_is_told_of_too(module: str) -> None:
    with ChildProcess.start(module, "the process") as child:
        child.request("double", said="x")
        child.pause()
        child.send("double", said="x")
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(OutOfResources, match=r"ended \(signal 9\): it said nothing"):
            child.receive()


def test_a_process_is_gone_behind_its_block_even_if_it_was_stopped(module: str) -> None:
    before = psutil.Process().num_fds()
    with ChildProcess.start(module, "the process") as child:
        child.request("double", said="x")
        child.pause()
        child.resume()
        child.pause()
        pid = child.pid
    assert not psutil.pid_exists(pid)
    assert psutil.Process().num_fds() == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_process_ends_with_the_one_that_started_it(module: str, tmp_path: Path) -> None:
    script = f"""
import os, time
from planish.optimizer.system.child_process import ChildProcess
child = ChildProcess.start({module!r}, "the process")
child.request("double", said="x")
child.pause()
print(child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=tmp_path) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_for_end(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_process_that_is_still_importing_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "slow_to_import.py").write_text(
        f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    script = """
import time
from planish.optimizer.system.child_process import ChildProcess
child = ChildProcess.start("slow_to_import", "the process")
time.sleep(600)
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}) as parent:
        deadline = time.monotonic() + 60
        while not (begun.is_file() and begun.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.kill()
    wait_for_end(int(begun.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has forks that are safe")
class TestForks:
    """Copies of this process."""

    def test_a_fork_sends_as_it_goes(self) -> None:
        def work(channel: Channel) -> None:
            print("nobody reads this")
            channel.send(Message("begun"))
            channel.send(Message("done", {}, {"x": np.ones(3)}))

        with ChildProcess.fork(work, "the fork") as child:
            deadline = time.monotonic() + 60
            begun, done = child.receive_before(deadline), child.receive_before(deadline)
            assert begun is not None and done is not None
            assert (begun.name, done.name) == ("begun", "done")
            np.testing.assert_array_equal(done.arrays["x"], np.ones(3))
            assert child.receive_before(deadline) is None
            assert child.wait() == 0

    def test_errors_and_bugs(self) -> None:
        def refuse(_: Channel) -> None:
            raise BadInput("it is bad")

        def fail(_: Channel) -> None:
            raise KeyError("a bug")

        with ChildProcess.fork(refuse, "the fork") as child, pytest.raises(BadInput, match="it is bad"):
            child.receive()
        with (
            ChildProcess.fork(fail, "the fork") as child,
            pytest.raises(InternalError, match=r"the fork ended \(exit code 1\): KeyError: 'a bug'"),
        ):
            child.receive()

    def test_a_deadline(self) -> None:
        with ChildProcess.fork(lambda _: time.sleep(600), "the fork") as child:
            with pytest.raises(TimeoutError):
                child.receive_before(time.monotonic() + 0.05)
            pid = child.pid
        assert not psutil.pid_exists(pid)

    def test_an_end_is_seen_though_another_process_has_the_connection(self) -> None:
        """As a fork has that another thread made meanwhile."""

        def work(channel: Channel) -> None:
            if os.fork() == 0:
                os.setsid()
                time.sleep(5)
                os._exit(0)
            channel.send(Message("done"))
            os._exit(3)

        with ChildProcess.fork(work, "the fork") as child:
            deadline = time.monotonic() + 0.5
            done = child.receive_before(time.monotonic() + 60)
            assert done is not None
            assert child.receive_before(deadline) is None
            assert child.wait() == 3

    def test_signals_end_it_as_any_process(self) -> None:
        with ChildProcess.fork(lambda _: time.sleep(600), "the fork") as child:
            os.kill(child.pid, signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                child.receive()
