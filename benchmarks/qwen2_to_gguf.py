"""A checkpoint of Qwen2 as a file of llama.cpp in Q4_0, by its own package: python qwen2_to_gguf.py CHECKPOINT OUT.

All matrices are in Q4_0, the embedding that is the head as well; words have made-up names, for there is no tokenizer.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

source, out = map(Path, sys.argv[1:])
config = json.loads((source / "config.json").read_text())
weights = load_file(source / "model.safetensors")
writer = gguf.GGUFWriter(out, "qwen2")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(float((config.get("rope_parameters") or config)["rope_theta"]))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list([f"t{index}" for index in range(config["vocab_size"])])
writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
writer.add_token_merges(["t 1"])
writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
for name, tensor in weights.items():
    called = names.get_name(name, try_suffixes=(".weight", ".bias"))
    array = tensor.to(torch.float32).numpy()
    if array.ndim == 2:
        packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(called, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    else:
        writer.add_tensor(called, np.ascontiguousarray(array))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
