"""Gemma 3 270M from its file of llama.cpp to a checkpoint folder in bf16: python gemma3_from_gguf.py FILE.gguf OUT.

The file names the sizes; what it leaves out are the constants of this architecture. Norms are stored there with one
added to them, as llama.cpp multiplies by them.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

source, out = map(Path, sys.argv[1:])
reader = gguf.GGUFReader(source)


def field(name: str) -> int:
    """A size from the file's header."""
    return int(reader.fields[f"gemma3.{name}"].contents())


config = Gemma3TextConfig(
    vocab_size=262_144,
    hidden_size=field("embedding_length"),
    intermediate_size=field("feed_forward_length"),
    num_hidden_layers=field("block_count"),
    num_attention_heads=field("attention.head_count"),
    num_key_value_heads=field("attention.head_count_kv"),
    head_dim=field("attention.key_length"),
    query_pre_attn_scalar=field("attention.key_length"),
    sliding_window=field("attention.sliding_window"),
    max_position_embeddings=field("context_length"),
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    tie_word_embeddings=True,
)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
model = Gemma3ForCausalLM(config)
called = {
    names.get_name(name, try_suffixes=(".weight",)): name for name in model.state_dict() if name != "lm_head.weight"
}
weights = {}
for tensor in reader.tensors:
    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    name = called.pop(tensor.name)
    weights[name] = torch.from_numpy(np.ascontiguousarray(array - 1 if "norm" in name else array))
if called:
    sys.exit(f"{source} has no weights for {sorted(called.values())}")
weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
model.load_state_dict(weights)
model.to(torch.bfloat16).save_pretrained(out)
AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
