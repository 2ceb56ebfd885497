"""Nothing is reported to anybody: a whole build without network asks for no address and leaves nothing in HOME.

ONNX Runtime looks addresses up in C++, which Python's audit hooks do not see: strace does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.breadth, pytest.mark.slow]

ASKING = re.compile(r"\b(connect|sendto|sendmsg|sendmmsg)\(.*AF_INET")
"""Whoever asks a server of names, or another, calls one of these. urllib3 only binds a socket of its own to look for IPv6."""
BUILD = """
import sys, time
from planish.optimizer.cli import main
try:
    main()
except SystemExit as ended:
    time.sleep(12)  # ONNX Runtime's uploader begins some seconds after the import
    raise
"""
LOOKUP = "import socket\ntry:\n    socket.getaddrinfo('planish.invalid', 80)\nexcept OSError:\n    pass"


def watched(place: Path, *command: str) -> tuple[int, str, list[str]]:
    """Exit code, standard error and the calls that ask the network, of a Python command in an empty HOME without it."""
    if shutil.which("strace") is None or shutil.which("unshare") is None:
        pytest.skip("needs strace and unshare: what native code asks the network is not seen without")
    if subprocess.run(["unshare", "-rn", "strace", "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows neither namespaces nor tracing")
    home, scratch, log = place / "home", place / "tmp", place / "calls"
    home.mkdir()
    scratch.mkdir()
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    trace = ("strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=%network", "-e", "signal=none", "-o", str(log))
    done = subprocess.run(
        ["unshare", "-rn", *trace, sys.executable, *command],
        env={**inherited, "HOME": str(home), "TMPDIR": str(scratch)},
        cwd=place,
        capture_output=True,
        text=True,
    )
    calls = [line for line in log.read_text(errors="replace").splitlines() if ASKING.search(line)]
    return done.returncode, done.stderr, calls


def test_a_look_up_would_be_seen(tmp_path: Path) -> None:
    assert watched(tmp_path, "-c", LOOKUP)[2]


def test_a_whole_build_asks_nobody_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    targets = ("--target", "onnxruntime", "--target", "openvino", "--shape", "batch=1,sequence=8")
    code, said, calls = watched(tmp_path, "-c", BUILD, "optimize", str(tiny), "-o", "out", *targets)
    assert code == 0, said
    assert calls == []
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    assert list((tmp_path / "tmp").rglob("*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "home", "out", "tmp"]
