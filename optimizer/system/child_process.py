"""Child processes that work for this one, and the messages that both exchange.

A child runs a module of ours in a Python of its own, or is a fork of this process. It is connected by a socket of its
own, so nothing that a runtime prints can mix with a message. A message is a name, plain values and arrays. Errors of
ours are messages too: what the child raises for the user is raised again here.

A child ends with the block in which it was entered, and with the process that started it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import numpy as np

from planish.optimizer import errors
from planish.optimizer.errors import InternalError, NoAnswer, OutOfResources, PlanishError
from planish.optimizer.system import interrupts
from planish.optimizer.system.child_main import end_with
from planish.optimizer.system.scratch import scratch_file

_CHILD_MAIN = "planish.optimizer.system.child_main"
_ERROR = "error"
"""The name of a message that holds an error."""
_LAST_LINE = 300
"""Characters of what an ended process said last."""


@dataclass(frozen=True)
class Message:
    """A request, or the reply to one."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values that JSON can hold."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Channel:
    """One end of the connection of two processes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: Message) -> None:
        """Send a message. ConnectionError if the other process is gone."""
        from safetensors.numpy import save

        # Never `Connection.send`, which pickles: a runtime may have been taken over by the file that it reads, and what
        # comes back from it must not run code here. JSON and safetensors hold data only.
        header = {"name": message.name, "values": dict(message.values), "has_arrays": bool(message.arrays)}
        self._connection.send_bytes(json.dumps(header).encode())
        if message.arrays:
            contiguous = {name: np.asarray(array, order="C") for name, array in message.arrays.items()}
            self._connection.send_bytes(save(contiguous))

    def receive(self) -> Message:
        """The next message. Raises the error that was sent, or EOFError if the other process has closed its end."""
        from safetensors.numpy import load

        try:
            header = json.loads(self._connection.recv_bytes())
            arrays = load(self._connection.recv_bytes()) if header["has_arrays"] else {}
        except OSError as error:
            # Without a number: the other process ended in the middle of a message. A connection is reset if it ended
            # before it had read everything.
            if error.errno is not None and not isinstance(error, ConnectionError):
                raise
            raise EOFError from error
        if header["name"] == _ERROR:
            raise errors.decode(header["values"])
        return Message(header["name"], header["values"], arrays)

    def has_message(self, seconds: float) -> bool:
        """Wait up to so many seconds for the next message, or for the end of the connection."""
        return self._connection.poll(max(seconds, 0.0))

    @contextmanager
    def sending_errors(self) -> Iterator[None]:
        """Send an exception of the block as an error for the user; one that is a bug of ours is raised."""
        try:
            yield
        except Exception as error:
            told = errors.of_exception(error)
            if told is None:
                raise
            self.send(Message(_ERROR, errors.encode(told)))

    def close(self) -> None:
        """Close this end: the other process receives EOFError."""
        self._connection.close()


class ChildProcess:
    """A process that works for this one."""

    def __init__(
        self, process: subprocess.Popen[bytes] | _Fork, channel: Channel, log: IO[bytes], subject: str, where: object
    ) -> None:
        self._process = process
        self._channel = channel
        self._log = log
        self._subject = subject
        self._where = where

    @classmethod
    def start(
        cls, module: str, subject: str, *, where: object = None, environment: Mapping[str, str] | None = None
    ) -> Self:
        """Start a process that calls ``module.main``, which serves by `serve` or takes `parent_channel`.

        ``subject`` and ``where`` name the process in errors. ``environment`` replaces the variables of this process.
        """
        ours, theirs = Pipe()
        log = scratch_file()
        process = subprocess.Popen(
            # -P: `-m` alone has Python look for modules in the working folder first, where a `numpy.py` may lie.
            [sys.executable, "-P", "-m", _CHILD_MAIN, module, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # what runtimes print there is not for our users
            stderr=log,
            pass_fds=(theirs.fileno(),),
            env=environment,
        )
        theirs.close()
        return cls(process, Channel(ours), log, subject, where)

    @classmethod
    def fork(cls, work: Callable[[Channel], None], subject: str, *, where: object = None) -> Self:
        """Run ``work`` in a copy of this process: it starts within milliseconds, and knows all that this one knows.

        The copy also has the locks that other threads hold at that moment, and may wait for them without end.
        """
        ours, theirs = Pipe()
        log = scratch_file()
        # An exception of a signal must not leave this function twice, in both processes.
        with interrupts.uninterrupted():
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                ours.close()
                _work_and_exit(work, Channel(theirs), log, parent)
            child = cls(_Fork(pid), Channel(ours), log, subject, where)
        theirs.close()
        return child

    def __enter__(self) -> Self:
        """Use the process inside."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()  # a stopped process too
        self._process.wait()
        self._channel.close()
        self._log.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def request(self, name: str, arrays: Mapping[str, np.ndarray] | None = None, /, **values: Any) -> Message:
        """Send a request and wait for its reply; raises as `receive` does."""
        self.send(name, arrays, **values)
        return self.receive()

    def request_within(
        self, seconds: float, name: str, arrays: Mapping[str, np.ndarray] | None = None, /, **values: Any
    ) -> Message:
        """The reply to a request; where there is none after ``seconds`` the process is ended, and NoAnswer raised.

        Runtimes were seen to spin for ever.
        """
        self.send(name, arrays, **values)
        if not self._channel.has_message(seconds):
            self._process.kill()
            what = f"{self._subject} gave no answer for {seconds:.0f} s, and was ended"
            raise NoAnswer(what, where=self._where, advice="try other options of the target, or other passes")
        return self.receive()

    def send(self, name: str, arrays: Mapping[str, np.ndarray] | None = None, /, **values: Any) -> None:
        """Send a request whose reply is received later."""
        with suppress(ConnectionError):  # the process has ended: `receive` tells why
            self._channel.send(Message(name, values, arrays or {}))

    def receive(self) -> Message:
        """The next reply. Raises the error that the process sent, or the one of its end."""
        try:
            return self._channel.receive()
        except EOFError:
            raise self.failure() from None

    def receive_before(self, deadline: float) -> Message | None:
        """The next reply, None if the process has ended; TimeoutError at ``deadline`` (of `time.monotonic`)."""
        if not self._channel.has_message(deadline - time.monotonic()) and self._process.poll() is None:
            raise TimeoutError
        # A fork of another thread may hold the connection of an ended process open: there is nothing to wait for then.
        if not self._channel.has_message(0):
            return None
        try:
            return self._channel.receive()
        except EOFError:
            return None

    def wait(self) -> int:
        """Wait for its end; the exit code or minus the signal. KeyboardInterrupt if it was asked to end, as we were."""
        code = self._process.wait()
        interrupts.check_ended(code)
        return code

    def failure(self) -> PlanishError:
        """The error of a process that has ended by itself."""
        code = self.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        last = lines[-1][:_LAST_LINE] if lines else "it said nothing"
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        kind = OutOfResources if code == -signal.SIGKILL else InternalError  # the kernel kills when memory ran out
        return kind(f"{self._subject} ended ({how}): {last}", where=self._where)

    def pause(self) -> None:
        """Stop the process where the system can."""
        if hasattr(signal, "SIGSTOP"):
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue it."""
        if hasattr(signal, "SIGCONT"):
            self._process.send_signal(signal.SIGCONT)


class _Fork:
    """A copy of this process, with the methods of `subprocess.Popen` that are used here."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code if it has ended."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = self._wait(0)
        if code is None:
            raise InternalError("a process was waited for and has not ended")
        return code

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Send a signal to it, if it has not ended: another process may have its number then."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            ended, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code


def _work_and_exit(work: Callable[[Channel], None], channel: Channel, log: IO[bytes], parent: int) -> NoReturn:
    """In a fork: work, and leave without what a process does at its end, which is the parent's to do."""
    code = 1
    try:
        faulthandler.disable()  # its descriptor is the parent's
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        end_with(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.ENDING)  # `fork` has blocked them
        with channel.sending_errors():
            work(channel)
        code = 0
    except Exception as error:
        log.write(f"{type(error).__name__}: {error}".encode(errors="backslashreplace"))
        log.flush()
        raise
    finally:
        os._exit(code)


def parent_channel() -> Channel:
    """The connection to the process that started this one by `ChildProcess.start`."""
    return Channel(Connection(int(sys.argv[2])))


def serve(answer: Callable[[Message], Message]) -> None:
    """Answer the requests of the process that started this one, until it closes the connection."""
    channel = parent_channel()
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        with channel.sending_errors():
            channel.send(answer(request))
