"""Decoders in 4 bits beside those who are known for it, tokens a second: `python -m benchmarks.decode`.

Qwen2-0.5B's shape with random weights: how fast it is does not depend on them. Every engine reads the same prompt and
writes the same number of tokens, the best one each time, in a process of its own; turns alternate while the others are
stopped.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import click

from benchmarks.exact import MODELS, OPTIMUM_INTEL, Refused, made
from benchmarks.record import record, settle_memory
from benchmarks.subjects import PLACE, TARGETS, environment, qwen2
from planish.optimizer import optimize
from planish.optimizer.interfaces import registry
from planish.optimizer.pipeline.presets import pipeline_text
from planish.optimizer.system.machine import instruction_set
from planish.optimizer.timing.interleaved import timing

PROMPT, STEPS = 128, 32
_GENAI, _LLAMA = PLACE / "genai", PLACE / "llama"
_PACKAGES = {
    _GENAI: (
        "torch==2.13.0",
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.31.1",
        "transformers",
        "onnx-ir",
        "requests",
    ),
    _LLAMA: ("llama-cpp-python==0.3.36", "gguf", "safetensors", "torch==2.13.0"),
}
_SWITCHES = {
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "avx_vnni": "AVX_VNNI",
}
"""Instruction sets that llama.cpp is built for where the processor has them, beside its defaults. Its kernels for AMX
are left out: they end with an illegal instruction at their first load of a tile where this was measured."""


@dataclass(frozen=True)
class Writer:
    """One engine and how its turns are asked for."""

    label: str
    python: Path
    kind: str
    path: Path
    target: str = ""

    def command(self) -> list[str]:
        """The command line of its process."""
        script = Path(__file__).with_name("decode_turns.py")
        return [*map(str, (self.python, script, self.kind, self.path, PROMPT, STEPS)), self.target]


class Process:
    """A writer at work, stopped between its turns."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._process = subprocess.Popen(
            writer.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        """Wait until it has written once; Refused if it does not come to that."""
        self._line()
        self._process.send_signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def turn(self) -> tuple[float, float]:
        """Milliseconds of the prompt, and of one token behind it."""
        self._process.send_signal(signal.SIGCONT)
        if self._process.stdin is None:
            raise RuntimeError("the process has no input")
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        read, written = json.loads(self._line())
        self._process.send_signal(signal.SIGSTOP)
        return float(read), float(written)

    def _line(self) -> str:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            said = "" if self._process.stderr is None else self._process.stderr.read()
            raise Refused(f"{self._writer.label} ended with {self._process.wait()}: {said[-500:]}")
        return line


def genai(block: int = 32) -> Path:
    """onnxruntime-genai's own model builder in 4 bits, in blocks of 32 as its documentation recommends for a CPU."""

    def make() -> None:
        options = [f"int4_block_size={block}", "int4_accuracy_level=4"]
        builder = [environment(_GENAI, _PACKAGES[_GENAI]), "-m", "onnxruntime_genai.models.builder", "-p", "int4"]
        named = [*builder, "-i", qwen2(), "-o", place, "-e", "cpu", "-c", PLACE / "genai-cache"]
        subprocess.run(list(map(str, [*named, "--extra_options", *options])), check=True, stdout=subprocess.DEVNULL)

    place = PLACE / "plain" / "qwen2-0.5b" / f"genai-int4-{block}"
    return made(place, make)


def llama_python() -> Path:
    """The environment of llama.cpp's Python package, built for this processor."""
    has = instruction_set().split()
    switches = ["-DGGML_NATIVE=OFF", *(f"-DGGML_{switch}=ON" for flag, switch in _SWITCHES.items() if flag in has)]
    return environment(_LLAMA, _PACKAGES[_LLAMA], CMAKE_ARGS=" ".join(switches))


def llama() -> Path:
    """A file of llama.cpp in Q4_0, made by its own Python package."""

    def make() -> None:
        place.mkdir()
        script = Path(__file__).with_name("gguf_of_qwen2.py")
        subprocess.run([llama_python(), script, qwen2(), place / "model.gguf"], check=True)

    place = PLACE / "plain" / "qwen2-0.5b" / "llama"
    return made(place, make) / "model.gguf"


def optimum_intel() -> Path:
    """`optimum-cli export openvino --weight-format int4`."""

    def make() -> None:
        model = MODELS["qwen2-0.5b"]
        exporter = [OPTIMUM_INTEL / "bin" / "python", "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        options = [
            "--library",
            "transformers",
            "--task",
            model.task,
            "--weight-format",
            "int4",
            "--model",
            qwen2(),
            place,
        ]
        subprocess.run(list(map(str, [*exporter, *options])), check=True, stdout=subprocess.DEVNULL)

    place = PLACE / "plain" / "qwen2-0.5b" / "optimum-intel-int4"
    return made(place, make)


def ours(target: str, logits: Literal["all", "last"]) -> Path:
    """The pipeline of the preset `small`, everything in 4 bits. Random weights do not survive that, and what is timed
    is not their answers: nothing is compared."""
    name = target.partition("{")[0]
    place = PLACE / "ours" / f"qwen2-0.5b-small-{logits}-{name}"

    def make() -> None:
        text = pipeline_text("small", name)
        optimize(qwen2(), place, targets=[target], pipeline=text, reference="none", logits=logits)

    return made(place, make) / name


def field() -> list[Writer]:
    """Everybody; the first is what others are compared with."""
    here = Path(sys.executable)

    def own(target: str, logits: Literal["all", "last"]) -> Writer:
        scores = "" if logits == "all" else ", last scores"
        return Writer(
            f"planish small on {registry.backend(target).name}{scores}", here, "planish", ours(target, logits), target
        )

    makers: list[Callable[[], Writer]] = [
        lambda: Writer("onnxruntime-genai int4", environment(_GENAI, _PACKAGES[_GENAI]), "genai", genai()),
        lambda: Writer(
            "onnxruntime-genai int4, blocks of 128", environment(_GENAI, _PACKAGES[_GENAI]), "genai", genai(128)
        ),
        lambda: own(TARGETS[0], "all"),
        lambda: own(TARGETS[0], "last"),
        lambda: Writer("llama.cpp Q4_0, last scores", llama_python(), "llama", llama()),
        lambda: Writer("optimum-intel int4", here, "planish", optimum_intel(), TARGETS[1]),
        lambda: own(TARGETS[1], "all"),
        lambda: own(TARGETS[1], "last"),
    ]
    found = []
    for make in makers:
        try:
            writer = make()
            with Process(writer):
                found.append(writer)
        except (subprocess.CalledProcessError, Refused) as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def alternate(writers: Sequence[Writer], rounds: int) -> list[list[tuple[float, float]]]:
    """Turns of everybody, in an order that changes."""
    turns: list[list[tuple[float, float]]] = [[] for _ in writers]
    settle_memory()
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(writer)) for writer in writers]
        for number in range(rounds):
            for place in range(len(processes)):
                index = (place + number) % len(processes)
                turns[index].append(processes[index].turn())
    return turns


@click.command()
@click.option("--rounds", default=15, show_default=True)
def main(rounds: int) -> None:
    """Time decoders in 4 bits."""
    writers = field()
    start = time.perf_counter()
    turns = alternate(writers, rounds)
    figures, rows = {}, []
    for writer, own in zip(writers, turns, strict=True):
        # A round counts as an opening of its own: some of these peers open once for all rounds.
        parts = [timing([[turn[i]] for turn in turns[0]], [[turn[i]] for turn in own]) for i in (0, 1)]
        speed = 1e3 / statistics.median(turn[1] for turn in own)
        figures[writer.label] = {"prefill": parts[0].__dict__, "decode": parts[1].__dict__, "tokens_per_second": speed}
        ratios = [f"{one.speedup:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in parts]
        rows.append((writer.label, f"{parts[0].median_ms:.0f}", f"{speed:.1f}", *ratios))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    base = writers[0].label
    columns = ("engine", f"prompt of {PROMPT}, ms", "tokens a second", f"prompt, times {base}", f"decode, times {base}")
    record("decode", "Qwen2-0.5B's shape in 4 bits, one text, two threads", columns, rows, figures)


if __name__ == "__main__":
    main()
