"""Write a Transformers model of the shape of Llama 3.1 8B with random weights into a folder.

For measuring speed, which does not depend on what a model has learnt. The tokenizer is the embedded model's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparsek.engines.model_file import embedded_model

SHAPE = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    dtype="bfloat16",
)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(SHAPE)
    model.save_pretrained(folder)
    tokenizer = embedded_model()
    AutoTokenizer.from_pretrained(tokenizer.parent, gguf_file=tokenizer.name).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: random_model.py FOLDER")
    main(Path(sys.argv[1]))
