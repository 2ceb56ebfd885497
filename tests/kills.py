"""Kill builds at random moments, and look at what is left: `python -m tests.kills --count 500 --seed 0`.

Each round starts the real command, waits for a random part of its usual time, and sends SIGKILL, SIGTERM or SIGINT to the
command, to one of the processes below it, or to all of them at once, as a terminal does. Then:

- OUT is what it was before, or a new output that is whole;
- SIGTERM and SIGINT to the command are answered within two seconds, by exit code 130 and one line that tells the truth;
- no process is left, and nothing beside OUT or in TMPDIR that the next run does not remove.

A round is reproduced by its own seed: `--count 1 --seed N` is round N.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from planish.optimizer.errors import PlanishError
from planish.optimizer.output.manifest import Manifest, digest_of
from planish.optimizer.system.scratch import PREFIX, sweep
from planish.optimizer.system.staging import sweep_up
from tests.zoo import Species, build

ANSWER = 2.0
"""Seconds in which a polite signal must be answered."""
_BEFORE_MAIN = 0.5
"""In the first seconds a signal may end Python itself: nothing is there yet that could be left."""
_COMMAND = (sys.executable, "-m", "planish.optimizer.cli")
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_WHOM = ("command", "command", "below", "all")
_LIVES = (psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING, psutil.STATUS_DISK_SLEEP, psutil.STATUS_STOPPED)


@dataclass(frozen=True)
class Kind:
    """A command, and what it leaves when nobody disturbs it."""

    arguments: tuple[str, ...]
    out: str
    seconds: float
    result: Mapping[str, str | None]
    """Hashes of the output's files, by name."""


@dataclass(frozen=True)
class Round:
    """What happened in one round."""

    told: str
    faults: tuple[str, ...]


def hashes(out: Path) -> dict[str, str | None]:
    """Of every file of an output, or of a file and its weights; empty if there is nothing."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file()] if out.is_dir() else [out, Path(f"{out}.data")]
    return {str(path.relative_to(out.parent)): digest_of(path) for path in paths if path.is_file()}


def prepare(place: Path) -> list[Kind]:
    """A tiny checkpoint and a graph, and each command run once undisturbed."""
    build(Species("bert", "text-classification"), place / "tiny")
    lowered = place / "lowered"
    run_once(place, ("optimize", str(place / "tiny"), "-o", str(lowered), "--pipeline", "fold-constants"))
    graph = str(lowered / "onnxruntime" / "model.onnx")
    sizes = ("--shape", "batch=1,sequence=8")
    commands = [
        (("optimize", str(place / "tiny"), "-o", "out", *sizes), "out"),
        (("optimize", str(place / "tiny"), "-o", "out", "--reference", "none", "--pipeline", "fold-constants"), "out"),
        (("optimize", graph, "-o", "out", "--target", "openvino", "--pipeline", "fold-constants", *sizes), "out"),
        (("opt", graph, "-o", "m.onnx", "--pipeline", "fold-constants,fuse-attention"), "m.onnx"),
    ]
    kinds = []
    for number, (arguments, out) in enumerate(commands):
        folder = place / f"whole{number}"
        folder.mkdir()
        seconds = run_once(folder, arguments)
        kinds.append(Kind(arguments, out, seconds, hashes(folder / out)))
    return kinds


def run_once(folder: Path, arguments: Sequence[str]) -> float:
    """Seconds of a command that nobody disturbs."""
    start = time.monotonic()
    subprocess.run([*_COMMAND, *arguments], cwd=folder, check=True, capture_output=True)
    return time.monotonic() - start


def kill_one(kind: Kind, whole: Path, place: Path, seed: int) -> Round:
    """One round in the empty folder ``place``; ``whole`` is where the command ran undisturbed."""
    rng = random.Random(seed)
    folder, scratch = place / "work", place / "tmp"
    folder.mkdir(parents=True)
    scratch.mkdir()
    if rng.random() < 0.7:
        _copy(whole / kind.out, folder / kind.out)
    before = hashes(folder / kind.out)
    sent, whom = rng.choice(_SIGNALS), rng.choice(_WHOM)
    moment = rng.uniform(0, 1.05) * kind.seconds
    with (place / "said").open("wb") as said:
        process = subprocess.Popen(
            [*_COMMAND, *kind.arguments],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(scratch)},
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < moment:
        time.sleep(0.01)
    over = process.poll() is not None
    hit = "" if over else _send(process, sent, whom, rng)
    killed = time.monotonic()
    limit = ANSWER if hit != "below" and sent is not signal.SIGKILL else 20 * kind.seconds + 60
    try:
        code: int | None = process.wait(limit + ANSWER)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - killed
    line = (place / "said").read_text(encoding="utf-8", errors="replace")
    faults = [] if over else _answer_faults(sent, hit, code, seconds, killed - started < _BEFORE_MAIN, line)
    faults += _left_faults(process)
    process.kill()
    process.wait()
    faults += _output_faults(kind, folder, scratch, before, line)
    return Round(
        f"{kind.arguments[0]} {sent.name} at {moment:.2f} s to {hit or 'nobody'}: {code} after {seconds:.2f} s",
        tuple(faults),
    )


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
        return
    for suffix in ("", ".data"):
        if Path(f"{source}{suffix}").is_file():
            shutil.copy(f"{source}{suffix}", f"{target}{suffix}")


def _send(process: subprocess.Popen[bytes], sent: signal.Signals, whom: str, rng: random.Random) -> str:
    """Send the signal; whom it hit."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        if whom == "below" and children:
            rng.choice(children).send_signal(sent)
            return "below"
    except psutil.NoSuchProcess:
        return ""  # it ended just now
    if whom == "all":
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    return "all" if whom == "all" else "command"


def _answer_faults(
    sent: signal.Signals, hit: str, code: int | None, seconds: float, early: bool, line: str
) -> list[str]:
    """How the command ended, held against how it should."""
    if code is None:
        return ["it does not end"]
    faults = ["it shows a traceback"] if "Traceback" in line and not early else []
    if hit == "below":  # it may have done its part already
        allowed = (0, 5) if sent is signal.SIGKILL else (0, 130)
        return [*faults, *([] if code in allowed else [f"exit code {code}: {line.splitlines()[-1:]}"])]
    if sent is signal.SIGKILL:
        return faults
    if seconds > ANSWER:
        faults.append(f"answered after {seconds:.2f} s")
    if early and code in (-sent, 1):
        return faults
    if code != 130 and not (code == 0 and seconds < 0.2):  # the very end: all was written already
        faults.append(f"swallowed: exit code {code}: {line.splitlines()[-1:]}")
    return faults


def _left_faults(process: subprocess.Popen[bytes]) -> list[str]:
    """Processes of the command's session that still live a second later."""
    until = time.monotonic() + ANSWER
    while time.monotonic() < until:
        left = [other for other in psutil.process_iter() if _belongs(other, process.pid)]
        if not left:
            return []
        time.sleep(0.05)
    return [f"process {other.pid} is left" for other in left]


def _belongs(other: psutil.Process, session: int) -> bool:
    try:
        return other.pid != session and os.getsid(other.pid) == session and other.status() in _LIVES
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _output_faults(kind: Kind, folder: Path, scratch: Path, before: Mapping[str, str | None], line: str) -> list[str]:
    """What is wrong with the output, with what the line says of it, and with what stays when the next run begins."""
    out = folder / kind.out
    now = hashes(out)
    gone = not out.exists()
    until = time.monotonic() + ANSWER
    while True:  # what the next run does first; a process that was just killed may hold its locks for a moment
        sweep_up(out, is_file=kind.out != "out")
        sweep(scratch, PREFIX)
        left = [path.name for path in folder.iterdir() if path.name not in (kind.out, f"{kind.out}.data")]
        left += [path.name for path in scratch.iterdir()]
        if not left or time.monotonic() > until:
            break
        time.sleep(0.05)
    faults = []
    if hashes(out) != before and not _whole(kind, out):
        faults.append(f"torn: {sorted(hashes(out))}")
    if gone and before and kind.out == "out":
        faults.append("the old output was gone for a while")
    if "nothing was written" in line and now != before:
        faults.append("it says that nothing was written")
    return faults + ([f"left behind: {left}"] if left else [])


def _whole(kind: Kind, out: Path) -> bool:
    if not out.is_dir():
        return hashes(out) == kind.result
    try:
        files = Manifest.read(out).files
    except PlanishError:
        return False
    return bool(files) and all(digest_of(out / name) == digest for name, digest in files.items())


def run(count: int, seed: int, *, quiet: bool = False) -> list[str]:
    """Faults of ``count`` rounds, each with the seed of its round."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&`; commands would ignore it as well
        signal.signal(signal.SIGINT, signal.default_int_handler)
    faults = []
    codes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        kinds = prepare(Path(name))
        for number in range(seed, seed + count):
            index = number % len(kinds)
            place = Path(name) / f"round{number}"
            result = kill_one(kinds[index], Path(name) / f"whole{index}", place, number)
            shutil.rmtree(place)
            codes[result.told.split(" at ")[0]] += 1
            faults += [f"round {number}: {result.told}: {fault}" for fault in result.faults]
            if not quiet:
                print(f"{number} {result.told} {'; '.join(result.faults)}", flush=True)
    if not quiet:
        print(f"{count} rounds, {len(faults)} faults; {dict(codes)}")
    return faults


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = run(options.count, options.seed)
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
