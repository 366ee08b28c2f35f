"""llama-cpp-python: python llama_cpp_python.py MODEL PROMPT_FILE TOKENS GENERATED

Its own default is no flash attention. With the backend of the variable GGML_BACKEND_PATH it is on, for that
is what Sparse-K takes the place of.
"""

import ctypes
import json
import os
import pathlib
import sys
import time

import llama_cpp

path = os.environ.get("GGML_BACKEND_PATH")
if path:
    load = llama_cpp.llama_cpp._lib.ggml_backend_load
    load.restype = ctypes.c_void_p
    assert load(path.encode()), "refused"
file, text, tokens, generated = sys.argv[1:]
llm = llama_cpp.Llama(file, n_ctx=4096, verbose=False, **({"flash_attn": True} if path else {}))
prompt = llm.tokenize(pathlib.Path(text).read_bytes())[: int(tokens)]
start = time.perf_counter()
llm.eval(prompt)
seconds = time.perf_counter() - start
made = []
for token in llm.generate(prompt, temp=0.0, reset=True):
    made.append(token)
    if len(made) == int(generated):
        break
print(json.dumps({"text": llm.detokenize(made).decode(errors="replace"), "prompt_s": seconds}))
