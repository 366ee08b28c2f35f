"""Write the embedded model, or another GGUF file, as a model directory that vLLM takes: FOLDER [GGUF].

Weights are rounded to bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsek.engines.model_file import find_model


def main(folder: Path, model: str | None) -> None:
    file = find_model(model)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # What Transformers would do with weights that are packed still.
    loaded.hf_quantizer = None
    loaded.config.__dict__.pop("quantization_config", None)
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: export_model.py FOLDER [GGUF]")
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else None)
