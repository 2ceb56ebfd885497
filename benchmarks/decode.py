"""Decoders in 4 bits beside those who are known for it, tokens a second: `python -m benchmarks.decode`.

Qwen2-0.5B's shape with random weights: how fast it is does not depend on them. Gemma 3 270M with its own, and what it
loses in few bits, as perplexity on docstrings that nobody calibrated on. Every engine reads the same prompt and writes
the same number of tokens, the best one each time, in a process of its own; turns alternate while the others are
stopped.
"""

from __future__ import annotations

import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import click

from benchmarks.record import record, settle_memory
from benchmarks.subjects import (
    AS_LOADED,
    PLACE,
    TARGETS,
    Refused,
    environment,
    gemma3,
    gemma3_gguf,
    made,
    qwen2,
    run,
)
from planish.optimizer import optimize
from planish.optimizer.interfaces import registry
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer
from planish.optimizer.output.manifest import Manifest
from planish.optimizer.pipeline.presets import pipeline_text
from planish.optimizer.runtime.generation import DECODER
from planish.optimizer.system.machine import instruction_set
from planish.optimizer.timing.interleaved import timing
from tests.train import docstrings

PROMPT, STEPS = 128, 32
_GENAI, _LLAMA, _OPTIMUM_INTEL = PLACE / "genai", PLACE / "llama", PLACE / "optimum-intel"
_GENAI_BUILDER = PLACE / "genai-builder"
_GENAI_REST = ("torch==2.13.0", "onnxruntime==1.31.1", "onnx-ir", "requests")
_PACKAGES = {
    _GENAI: (*_GENAI_REST, "onnxruntime-genai==0.18.0", "transformers"),
    # The newest builder needs transformers 5, and an entry of Gemma 3's configuration that they no longer have.
    _GENAI_BUILDER: (*_GENAI_REST, "onnxruntime-genai==0.12.2", "transformers==4.57.6"),
    _LLAMA: ("llama-cpp-python==0.3.36", "gguf", "safetensors", "torch==2.13.0"),
    _OPTIMUM_INTEL: ("torch==2.13.0", "optimum-intel==2.2.0", "openvino==2026.4.1", "transformers==4.57.6"),
}
_SWITCHES = {
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "avx_vnni": "AVX_VNNI",
}
"""Instruction sets that llama.cpp is built for where the processor has them, beside its defaults. Its kernels for AMX
are left out: they end with an illegal instruction at their first load of a tile where this was measured."""
_KEEP = "perplexity<=1.02x"
_CALIBRATED_ON = 96
"""Docstrings of modules, none of a package: 32 that a build checks itself on, and 64 of calibration data."""
_CHARACTERS = 200
"""Shortest text: single lines say little about a decoder."""
_UNSEEN = "[jeux]*/*.py"
"""Files of packages, whose docstrings the perplexity is that of."""
_WINDOWS, _WINDOW = 32, 64
"""Texts and tokens of the perplexity."""
_LLAMA_TYPES = {"qwen2-0.5b": "Q4_0", "gemma3-270m": "Q4_K_M"}


@dataclass(frozen=True)
class Subject:
    """A decoder, and how it is called in a title."""

    name: str
    title: str
    checkpoint: Callable[[], Path]
    gguf: Callable[[], Path]
    """The file that llama.cpp opens."""
    genai_builder: Path
    """The environment of onnxruntime-genai that can build it."""
    trained: bool
    """Weights of its own: what it loses counts."""

    @property
    def plain(self) -> Path:
        """Where files of the peers lie."""
        return PLACE / "plain" / self.name


@dataclass(frozen=True)
class Writer:
    """One engine and how its turns are asked for."""

    label: str
    python: Path
    kind: str
    path: Path
    target: str = ""
    scores_all: bool = True
    """False for an engine whose twin with the scores of all tokens has the same weights: only that one is judged."""

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
        read, written = self._ask([])
        return float(read), float(written)

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        """Of the next tokens in windows of a text."""
        return float(self._ask(windows))

    def _ask(self, windows: Sequence[Sequence[int]]) -> Any:
        self._process.send_signal(signal.SIGCONT)
        if self._process.stdin is None:
            raise RuntimeError("the process has no input")
        self._process.stdin.write(json.dumps(windows) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._line())
        self._process.send_signal(signal.SIGSTOP)
        return reply

    def _line(self) -> str:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            said = "" if self._process.stderr is None else self._process.stderr.read()
            raise Refused(f"{self._writer.label} ended with {self._process.wait()}: {said[-500:]}")
        return line


def genai(subject: Subject, block: int) -> Path:
    """onnxruntime-genai's own model builder in 4 bits, in blocks of 32 as its documentation recommends for a CPU."""

    def make() -> None:
        options = [f"int4_block_size={block}", "int4_accuracy_level=4"]
        python = environment(subject.genai_builder, _PACKAGES[subject.genai_builder])
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-p", "int4"]
        named = [*builder, "-i", subject.checkpoint(), "-o", place, "-e", "cpu", "-c", PLACE / "genai-cache"]
        run([*named, "--extra_options", *options])

    place = subject.plain / f"genai-int4-{block}"
    return made(place, make)


def llama_python() -> Path:
    """The environment of llama.cpp's Python package, built for this processor."""
    has = instruction_set().split()
    switches = ["-DGGML_NATIVE=OFF", *(f"-DGGML_{switch}=ON" for flag, switch in _SWITCHES.items() if flag in has)]
    return environment(_LLAMA, _PACKAGES[_LLAMA], CMAKE_ARGS=" ".join(switches))


def qwen2_gguf() -> Path:
    """A file of llama.cpp in Q4_0, made by its own Python package."""

    def make() -> None:
        place.mkdir()
        run([llama_python(), Path(__file__).with_name("qwen2_to_gguf.py"), qwen2(), place / "model.gguf"])

    place = PLACE / "plain" / "qwen2-0.5b" / "llama"
    return made(place, make) / "model.gguf"


def optimum_intel(subject: Subject) -> Path:
    """`optimum-cli export openvino --weight-format int4`."""

    def make() -> None:
        # torchvision's CUDA build breaks a torch for CPUs.
        python = environment(_OPTIMUM_INTEL, _PACKAGES[_OPTIMUM_INTEL], without=["torchvision"])
        exporter = [python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        options = ["--library", "transformers", "--task", "text-generation-with-past", "--weight-format", "int4"]
        run([*exporter, *options, "--model", subject.checkpoint(), place])

    place = subject.plain / "optimum-intel-int4"
    return made(place, make)


def ours(subject: Subject, target: str, logits: Literal["all", "last"]) -> Path:
    """The preset `small` of a trained model, and again the pipeline that it chose for the scores of the last token.

    Random weights do not survive 4 bits, and what is timed is not their answers: there it is the preset's pipeline,
    everything is in 4 bits and nothing is compared.
    """
    name = registry.backend(target).name
    place = PLACE / "ours" / f"{subject.name}-small-{logits}-{name}"

    def make() -> None:
        built = partial(optimize, subject.checkpoint(), place, targets=[target], logits=logits)
        texts = list(itertools.islice(long_docstrings(), _CALIBRATED_ON))
        if not subject.trained:
            built(pipeline=pipeline_text("small", name), reference="none")
        elif logits == "all":
            built(preset="small", keep=[_KEEP], calibration=texts)
        else:
            chosen = Manifest.read(ours(subject, target, "all").parent).targets[name].pipelines.get(DECODER, "")
            built(pipeline=chosen, reference="none", calibration=texts)

    return made(place, make) / name


def plain(subject: Subject, target: str) -> Path:
    """The lowering as it is, without a pass that makes it faster."""
    name = registry.backend(target).name
    place = PLACE / "plain" / subject.name / f"lowered-{name}"

    def make() -> None:
        optimize(subject.checkpoint(), place, targets=[target], pipeline="", reference="none")

    return made(place, make) / name


def field(subject: Subject) -> list[Writer]:
    """Everybody; the first is what others are compared with."""
    here = Path(sys.executable)

    def own(target: str, logits: Literal["all", "last"], opened: str, told: str = "") -> Writer:
        scores = "" if logits == "all" else ", last scores"
        label = f"planish small on {registry.backend(target).name}{scores}{told}"
        return Writer(label, here, "planish", ours(subject, target, logits), opened, scores_all=logits == "all")

    def of_genai(block: int, told: str = "") -> Writer:
        python = environment(_GENAI, _PACKAGES[_GENAI])
        return Writer(f"onnxruntime-genai int4{told}", python, "genai", genai(subject, block))

    def of_optimum(opened: str, told: str = "") -> Writer:
        return Writer(f"optimum-intel int4{told}", here, "planish", optimum_intel(subject), opened)

    llama = f"llama.cpp {_LLAMA_TYPES[subject.name]}, last scores"
    makers: list[Callable[[], Writer]] = [
        lambda: of_genai(32),
        lambda: of_genai(128, ", blocks of 128"),
        lambda: own(TARGETS[0], "all", TARGETS[0]),
        lambda: own(TARGETS[0], "last", TARGETS[0]),
        lambda: Writer(llama, llama_python(), "llama", subject.gguf()),
        lambda: of_optimum(AS_LOADED),
        lambda: of_optimum(TARGETS[1], ", in f32"),
        lambda: own(TARGETS[1], "all", AS_LOADED),
        lambda: own(TARGETS[1], "last", AS_LOADED),
        lambda: own(TARGETS[1], "last", TARGETS[1], ", in f32"),
    ]
    writers = []
    for make in makers:
        try:
            writer = make()
            with Process(writer):
                writers.append(writer)
        except (subprocess.CalledProcessError, Refused) as error:
            print(f"left out: {error}", file=sys.stderr)
    return writers


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("qwen2-0.5b", "Qwen2-0.5B's shape", qwen2, qwen2_gguf, _GENAI, trained=False),
        Subject("gemma3-270m", "Gemma 3 270M", gemma3, gemma3_gguf, _GENAI_BUILDER, trained=True),
    )
}


def long_docstrings(files: str = "*.py") -> Iterator[str]:
    """Docstrings of the standard library that are no single lines."""
    return (text for text in docstrings(files) if len(text) >= _CHARACTERS)


def unseen(subject: Subject) -> list[list[int]]:
    """Windows of a text that nobody has calibrated on, each behind the token that texts begin with."""
    tokenizer: Any = load_tokenizer(subject.checkpoint())
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in long_docstrings(_UNSEEN))
    size = _WINDOW - 1
    ids = list(itertools.islice(itertools.chain.from_iterable(encoded), _WINDOWS * size))
    return [[tokenizer.bos_token_id, *ids[start : start + size]] for start in range(0, _WINDOWS * size, size)]


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
@click.option("--model", "names", multiple=True, type=click.Choice(list(SUBJECTS)), help="Only this; both if none.")
@click.option("--rounds", default=15, show_default=True)
def main(names: tuple[str, ...], rounds: int) -> None:
    """Time decoders in 4 bits."""
    for name in names or SUBJECTS:
        measure(SUBJECTS[name], rounds)


def measure(subject: Subject, rounds: int) -> None:
    """Time everybody, and judge those whose weights are trained."""
    writers = field(subject)
    start = time.perf_counter()
    turns = alternate(writers, rounds)
    windows = unseen(subject) if subject.trained else []
    figures, rows = {}, []
    for writer, timed in zip(writers, turns, strict=True):
        # A round counts as an opening of its own: some of these peers open once for all rounds.
        parts = [timing([[turn[i]] for turn in turns[0]], [[turn[i]] for turn in timed]) for i in (0, 1)]
        speed = 1e3 / statistics.median(turn[1] for turn in timed)
        figures[writer.label] = {"prefill": parts[0].__dict__, "decode": parts[1].__dict__, "tokens_per_second": speed}
        ratios = [f"{one.speedup:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in parts]
        rows.append([writer.label, f"{parts[0].median_ms:.0f}", f"{speed:.1f}", *ratios])
        if windows and writer.scores_all:
            with Process(writer) as process:
                figures[writer.label]["perplexity"] = process.perplexity(windows)
        if windows:
            perplexity = figures[writer.label].get("perplexity")
            rows[-1].append("" if perplexity is None else f"{perplexity:.2f}")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    base = writers[0].label
    columns = ["engine", f"prompt of {PROMPT}, ms", "tokens a second", f"prompt, times {base}", f"decode, times {base}"]
    columns += ["perplexity"] if windows else []
    title = f"{subject.title} in 4 bits, one text, two threads"
    record(f"decode-{subject.name}", title, columns, rows, figures, command="decode")


if __name__ == "__main__":
    main()
