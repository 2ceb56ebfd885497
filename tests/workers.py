"""Engines in the process of a test: a process for each, as users get it, imports numpy, onnx and a runtime anew.

That takes a second, and a build asks for dozens. Tests that are about these processes have them
(`@pytest.mark.processes`), and so has what runs the command line in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from planish.optimizer import errors
from planish.optimizer.runtime.worker import _EngineServer
from planish.optimizer.system.child_process import Message


class WorkerHere:
    """What `Worker` asks of a child process, answered in this one."""

    def __init__(self) -> None:
        self._server = _EngineServer()

    @classmethod
    def start(cls, *_: object, **__: object) -> Self:
        """Nothing is started."""
        return cls()

    def request(self, name: str, arrays: Mapping[str, np.ndarray] | None = None, /, **values: Any) -> Message:
        """The reply to a request; an error for the user is raised as it comes out of a process."""
        try:
            reply = self._server.answer(_sent(Message(name, values, arrays or {})))
        except Exception as error:
            told = errors.of_exception(error)
            if told is None:
                raise
            raise errors.decode(errors.encode(told)) from None
        return _sent(reply)

    def request_within(
        self, _: float, name: str, arrays: Mapping[str, np.ndarray] | None = None, /, **v: Any
    ) -> Message:
        """The reply to a request."""
        return self.request(name, arrays, **v)

    def close(self) -> None:
        """Let go of the engine and its memory."""
        self._server = _EngineServer()

    def pause(self) -> None:
        """Nothing runs between two requests."""

    def resume(self) -> None:
        """Nothing is stopped."""


def _sent(message: Message) -> Message:
    """The message as another process receives it: values as JSON holds them, arrays in memory of their own."""
    arrays = {name: np.array(array, order="C") for name, array in message.arrays.items()}
    return Message(message.name, json.loads(json.dumps(dict(message.values))), arrays)
