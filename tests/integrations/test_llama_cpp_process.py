"""The llama.cpp backend in processes of their own: wrong settings, wrong libraries, unknown hosts, signals,
threads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")

from sparsek.integrations.llama_cpp import backend_path

from .. import tiny_gguf
from ..waiting import HANGS
from .llama_host import write_float_model
from .service_variables import NOT_OF_A_SERVICE, OF_A_SERVICE

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]

# What a program does that loads the backend by itself, and goes on whether or not that succeeds.
HOST = """
import sys
from pathlib import Path
import numpy as np
from sparsek import SparseKConfig
from sparsek.engines import llama_api
from sparsek.engines.llama import LlamaEngine
from sparsek.integrations import llama_cpp as integration
from tests.integrations.llama_host import KEEP_ALL, Context, Host

library = llama_api.library()
library.ggml_backend_load.restype = llama_api.c_void_p
path, model = sys.argv[1:3]
tokens = [504, 3575, 282, 4649, 314] * 20
"""


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A program in a process of its own. Its environment has no other settings of ours."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSEK_", "OMP_"))}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code: str, *arguments: object, **environment: str) -> tuple[str, str]:
    """What a program that ends well writes to stdout and stderr."""
    with start(code, *arguments, **environment) as process:
        out, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 0, errors
    return out, errors


def our_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("sparsek: ")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the embedded model in float32: loads at once, and results agree to rounding."""
    file = tmp_path_factory.mktemp("model") / "float.gguf"
    write_float_model(file, 1)
    return file


# ---- The host goes on without us

# A model in the host, after it was asked for a backend.
PLAIN = (
    HOST
    + """
loaded = library.ggml_backend_load(path.encode())
name = library.ggml_backend_dev_by_name
name.restype, name.argtypes = llama_api.c_void_p, [llama_api.c_char_p]
integration.load_backend = integration.configure = lambda _: None
context = Context(Host(Path(model)), None)
logits = context.extend(tokens)
print(bool(loaded), bool(name(b"SPARSEK")), repr(float(logits.sum())))
"""
)


@pytest.fixture(scope="module")
def plain(model: Path) -> str:
    """What the host does by itself."""
    out, _ = run(PLAIN, "", model)
    assert out.startswith("False False ")
    return out


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("SPARSEK_TOP_K", "many", "SPARSEK_TOP_K: top_k = 'many': must be a whole number"),
        ("SPARSEK_TOP_K", "-3", "SPARSEK_TOP_K: top_k = '-3': must be a whole number"),
        ("SPARSEK_TOP_K", "", "SPARSEK_TOP_K: top_k = '': must be a whole number, auto"),
        ("SPARSEK_MIN_SHARE", "1.5", "SPARSEK_MIN_SHARE: min_share = '1.5': must be a number from 0 to 1"),
        ("SPARSEK_MIN_SHARE", "0,5", "SPARSEK_MIN_SHARE: min_share = '0,5': must be a number from 0 to 1"),
        ("SPARSEK_MIN_SHARE", "nan", "SPARSEK_MIN_SHARE: min_share = 'nan': must be a number from 0 to 1"),
        ("SPARSEK_WINDOW", "99999999999", "SPARSEK_WINDOW: window = '99999999999': must be a whole number"),
        ("SPARSEK_TAIL", "cut", "SPARSEK_TAIL: tail = 'cut': must be none or centroid"),
        ("SPARSEK_DENSE_LAYERS", "first", "SPARSEK_DENSE_LAYERS: dense_layers = 'first': must be"),
        ("SPARSEK_CONFIG", "/no/such.json", "SPARSEK_CONFIG = '/no/such.json': there is no such file"),
        ("SPARSEK_CONFIG", "/dev/zero", "SPARSEK_CONFIG = '/dev/zero': not a file"),
        ("SPARSEK_CONFIG", "/tmp", "SPARSEK_CONFIG = '/tmp': not a file"),
        ("SPARSEK_TOPK", "12", "there is no variable SPARSEK_TOPK: known are SPARSEK_CONFIG"),
        ("SPARSEK_TOP_K", "a\nb", "SPARSEK_TOP_K: top_k = 'a b': must be"),
        ("SPARSEK_NUM_THREADS", "0", "SPARSEK_NUM_THREADS = '0': must be"),
        ("SPARSEK_ISA", "foo", "SPARSEK_ISA = 'foo'"),
        ("SPARSEK_STATS", "yes", "SPARSEK_STATS = 'yes': must be 0 or 1"),
    ],
)
def test_wrong_variable(model: Path, plain: str, variable: str, value: str, line: str) -> None:
    out, errors = run(PLAIN, backend_path(), model, **{variable: value})
    assert [said.startswith(f"sparsek: {line}") for said in our_lines(errors)] == [True], errors
    assert out == plain


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"top_k": 64', "not a JSON object of settings, at character 12"),
        ("top_k = 64", "not a JSON object of settings, at character 0"),
        ('{"top_q": 64}', "there is no field 'top_q': known are top_k"),
        ('{"top_k": ' + "[" * 50_000, "not a JSON object of settings, at character 11"),
        ('{"window": [1]}', "not a JSON object of settings, at character 11: '[1]}'"),
        ('{"check_finite": "banana"}', "not a JSON object of settings"),
        ('{"top_k": [8, 0], "sinks": 0, "window": 0}', "keeps no key at all in a layer"),
        ('{"select": "tile"}', "select = 'tile': must be auto or query in llama.cpp: tiles are for GPUs"),
        ('{"min_share": "a lot"}', "min_share = 'a lot': must be a number from 0 to 1"),
        ('{"min_share": 2}', "min_share = '2': must be a number from 0 to 1"),
        ('{"tail": "cut"}', "tail = 'cut': must be none or centroid"),
    ],
)
def test_wrong_file(model: Path, plain: str, tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    out, errors = run(PLAIN, backend_path(), model, SPARSEK_CONFIG=str(file))
    (said,) = our_lines(errors)
    assert str(file) in said
    assert line in said
    assert out == plain


def test_right_variables(model: Path, tmp_path: Path) -> None:
    """The environment alone turns Sparse-K on; a variable comes before the file."""
    file = tmp_path / "settings.json"
    file.write_text('{"top_k": 9, "sinks": 1, "tail": "none", "dense_layers": [], "min_context": 0}')
    code = PLAIN + "print(integration.counts())"
    out, errors = run(code, backend_path(), model, SPARSEK_CONFIG=str(file))
    assert our_lines(errors) == [
        "sparsek: Sparse-K is in use in layers 0: "
        "top_k = 9, sinks = 1, window = 16, tail = none, min_context = 0"
    ]
    assert out.startswith("True True ")
    assert "sparse=1, dense=0, by_host=0" in out
    out, errors = run(code, backend_path(), model, SPARSEK_CONFIG=str(file), SPARSEK_DENSE_LAYERS="0")
    assert our_lines(errors) == ["sparsek: Sparse-K is not in use here: layers 0 (dense_layers)"]
    assert "sparse=0, dense=1, by_host=0" in out
    # A count without limit is dense attention, but not with a share.
    everything = {"SPARSEK_CONFIG": str(file), "SPARSEK_TOP_K": "99999"}
    for share, counted in (("0", "sparse=0, dense=1"), ("1e-2", "sparse=1, dense=0")):
        out, _ = run(code, backend_path(), model, **everything, SPARSEK_MIN_SHARE=share)
        assert counted in out
    out, errors = run(code, backend_path(), model, SPARSEK_CONFIG=str(file), SPARSEK_TOP_K="0")
    assert our_lines(errors) == ["sparsek: Sparse-K is not in use here: layers 0 (top_k = 0)"]
    assert "sparse=0, dense=0, by_host=0" in out


def test_what_a_service_called_sparsek_brings_is_no_setting(model: Path) -> None:
    """In a pod of Kubernetes: they change nothing, and a typing error beside them is still found."""
    out, errors = run(PLAIN, backend_path(), model, **OF_A_SERVICE)
    assert our_lines(errors) == ["sparsek: Sparse-K is not in use here: layers 0 (dense_layers)"]
    assert out.startswith("True True ")
    _, errors = run(LOADED, backend_path(), *NOT_OF_A_SERVICE, **OF_A_SERVICE)
    found = [line.split(":")[1] for line in our_lines(errors)]
    assert found == [f" there is no variable {variable}" for variable in NOT_OF_A_SERVICE]


# Asks the host for the backend once for each variable, which is then in the environment.
LOADED = """
import os, sys
from sparsek.engines import llama_api

load = llama_api.library().ggml_backend_load
load.restype = llama_api.c_void_p
path, *variables = sys.argv[1:]
for variable in variables:
    os.environ[variable] = "1"
    assert load(path.encode()) is None
    del os.environ[variable]
"""


# As ggml's own tests do: a backend is made and given its threads, and what it supports is asked then.
UNASKED = """
import sys
from ctypes import CFUNCTYPE, c_int, c_void_p
from sparsek.engines import llama_api

lib = llama_api.library()
for name in ("load", "dev_by_name", "dev_init", "dev_backend_reg", "reg_get_proc_address"):
    getattr(lib, "ggml_backend_" + name).restype = c_void_p
assert lib.ggml_backend_load(sys.argv[1].encode())
device = c_void_p(lib.ggml_backend_dev_by_name(b"SPARSEK"))
backend = c_void_p(lib.ggml_backend_dev_init(device, None))
registry = c_void_p(lib.ggml_backend_dev_backend_reg(device))
set_threads = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
CFUNCTYPE(None, c_void_p, c_int)(set_threads)(backend, 1)
"""


def test_nothing_is_told_where_nothing_was_asked_yet() -> None:
    _, errors = run(UNASKED, backend_path())
    assert our_lines(errors) == []


def test_a_context_without_flash_attention_is_told(model: Path) -> None:
    _, errors = run(PLAIN.replace("None)", "None, flash_attn_type=0)"), backend_path(), model)
    assert our_lines(errors) == [
        "sparsek: Sparse-K is not in use here: the model's graph has no flash attention (-fa on, or auto)"
    ]


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        ({}, "layers 0 (1024 tokens, min_context = 2048)"),
        ({"type_k": 2, "type_v": 2}, "layers 0 (the format of its cache)"),
    ],
    ids=str,
)
def test_why_not_is_told(model: Path, parameters: dict[str, int], line: str) -> None:
    code = PLAIN.replace("None)", f"None, **{parameters})")
    _, errors = run(code, backend_path(), model, SPARSEK_DENSE_LAYERS="none")
    assert our_lines(errors) == [f"sparsek: Sparse-K is not in use here: {line}"]


@pytest.mark.parametrize("whole", [True, False])
def test_layers_with_a_sliding_window_are_told(tmp_path: Path, whole: bool) -> None:
    """Before a mask was seen, a cache of their own tells of it, if they have one."""
    file = tiny_gguf.gemma2(window=64).write(tmp_path / "sliding.gguf")
    code = PLAIN.replace("None)", f"None, swa_full={whole}, n_ubatch=64)", 1)
    code = code.replace("[504, 3575, 282, 4649, 314]", "[5, 3, 2, 4, 1]")
    assert code.count("swa_full") == code.count("[5, 3, 2, 4, 1]") == 1
    variables = {"SPARSEK_DENSE_LAYERS": "none", "SPARSEK_MIN_CONTEXT": "300", "SPARSEK_STATS": "1"}
    _, errors = run(code + "context.extend([1] * 300)", backend_path(), file, **variables)
    line, totals = our_lines(errors)
    told = {
        True: "in layers 0-1: top_k = auto, sinks = 4, window = 16, tail = centroid, min_context = 300 "
        "(layers whose sliding window is shorter keep all)",
        False: "in layers 1: top_k = auto, sinks = 4, window = 16, tail = centroid, min_context = 300; "
        "not in layers 0 (256 tokens, min_context = 300)",
    }
    assert line == f"sparsek: Sparse-K is in use {told[whole]}"
    # Of seven batches the first is so short that it may be a question, and the last two end after 300 tokens.
    assert "prompts: 2 with Sparse-K, 10 dense, 0 given back" in totals


def test_who_computed_what_is_told_at_the_end(model: Path) -> None:
    code = PLAIN + "context.extend(tokens[:1]); context.extend(tokens[:1])"
    variables = {"SPARSEK_DENSE_LAYERS": "none", "SPARSEK_STATS": "1"}
    _, errors = run(code, backend_path(), model, SPARSEK_MIN_CONTEXT="0", **variables)
    assert our_lines(errors)[1:] == [
        "sparsek: attention operations of prompts: 1 with Sparse-K, 0 dense, 0 given back to the host; "
        "of steps: 2 with Sparse-K, 0 dense, 0 given back to the host"
    ]
    _, errors = run(code, backend_path(), model, SPARSEK_MIN_CONTEXT="500", **variables)
    assert our_lines(errors)[1:] == [
        "sparsek: attention operations of prompts: 0 with Sparse-K, 1 dense, 0 given back to the host; "
        "of steps: 0 with Sparse-K, 0 dense, 0 given back to the host; "
        "left to the host: some of layers 0 (steps below min_context)"
    ]


@pytest.mark.parametrize("kind", ["missing", "text", "another library"])
def test_wrong_library(model: Path, plain: str, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "libggml-sparsek.so"
    if kind == "text":
        file.write_text("not a library")
    if kind == "another library":
        compile_c(file, "int answer(void) { return 42; }")
    out, errors = run(PLAIN, file, model)
    assert str(file) in errors
    assert out == plain


def test_missing_library_in_the_engine() -> None:
    code = (
        "from pathlib import Path; from sparsek.engines.llama import LlamaEngine, integration;"
        "integration.backend_path = lambda: Path('/no/libggml-sparsek.so'); LlamaEngine(None)"
    )
    with start(code) as process:
        _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 1
    assert "FileNotFoundError: the llama.cpp backend is missing: /no/libggml-sparsek.so" in errors


def test_settings_that_the_engine_finds_wrong() -> None:
    with start("from sparsek.engines.llama import LlamaEngine; LlamaEngine(None)", SPARSEK_TOP_K="many") as p:
        _, errors = p.communicate(timeout=HANGS)
    assert p.returncode == 1
    assert "sparsek: SPARSEK_TOP_K: top_k = 'many'" in errors
    assert "ImportError: llama.cpp did not load the Sparse-K backend: the line above says why" in errors


def test_an_engine_that_is_gone_is_not_called() -> None:
    code = (
        "import gc; from sparsek.engines.llama import LlamaEngine; first = LlamaEngine(None)\n"
        "LlamaEngine(None); gc.collect(); print(len(list(first.generate([504, 3575], 3, None))))"
    )
    assert run(code)[0] == "3\n"


# ---- Hosts that are none, or not known

LOADED_BY = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
loaded = library.{function}
loaded.restype = ctypes.c_void_p
print(loaded({arguments}))
"""


def compile_c(file: Path, source: str) -> None:
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-o", file, "-", "-ldl"], input=source, text=True, check=True
    )


def test_process_without_ggml() -> None:
    out, errors = run(LOADED_BY.format(function="ggml_backend_init", arguments=""), backend_path())
    assert out == "None\n"
    (line,) = our_lines(errors)
    assert "has no function ggml_version: it is not a ggml that is known here" in line


STUB = """
#include <dlfcn.h>
#include <stddef.h>
struct registry { int api_version; void* rest[5]; };
static struct registry registry = { API_VERSION };
const char* ggml_version(void) { return "9.9.9"; }
size_t ggml_backend_reg_count(void) { return REGISTRIES; }
struct registry* ggml_backend_reg_get(size_t i) { (void)i; return &registry; }
void* load(const char* path) {
  void* (*init)(void) = (void* (*)(void))dlsym(dlopen(path, RTLD_NOW), "ggml_backend_init");
  void* volatile loaded = init();  /* no tail call: the backend looks at who called */
  return loaded;
}
"""


@pytest.mark.parametrize("version", [0, 1, 4, 6])
def test_unknown_interface(tmp_path: Path, version: int) -> None:
    out, line = load_into_stub(tmp_path, API_VERSION=version, REGISTRIES=1)
    assert out == "None\n"
    assert f"ggml 9.9.9 has backend interface {version}; supported are 2, 3: use a release" in line


def test_host_without_a_backend(tmp_path: Path) -> None:
    out, line = load_into_stub(tmp_path, API_VERSION=3, REGISTRIES=0)
    assert out == "None\n"
    assert "ggml 9.9.9 has no backend of its own yet: load its CPU backend first" in line


def test_known_interface_without_the_functions(tmp_path: Path) -> None:
    out, line = load_into_stub(tmp_path, API_VERSION=3, REGISTRIES=1)
    assert out == "None\n"
    assert re.search(r"libstub\.so has no function ggml_\w+: it is not a ggml that is known here", line)


# A backend's table: guid, name, free, and what stands at 3 to 8 tells which layout it has.
WHOLE = """
static int nothing(void) { return 0; }
static void* table[18] = { 0, nothing, nothing, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 };
size_t ggml_tensor_overhead(void) { return OVERHEAD; }
void* ggml_backend_init_by_type(int type, const char* parameters) {
  (void)type, (void)parameters;
  for (int i = FIRST; i < FIRST + 5; ++i) table[i] = nothing;
  return table;
}
#define STUB(name) int name(void) { return 0; }
STUB(ggml_backend_cpu_buffer_type) STUB(ggml_op_name) STUB(ggml_get_type_traits)
STUB(ggml_backend_buft_is_host) STUB(ggml_graph_n_nodes) STUB(ggml_graph_node) STUB(ggml_init) STUB(ggml_free)
STUB(ggml_new_tensor) STUB(ggml_flash_attn_ext) STUB(ggml_new_graph) STUB(ggml_build_forward_expand)
STUB(ggml_backend_free) STUB(ggml_backend_graph_compute)
"""


@pytest.mark.parametrize("version", [2, 3])
def test_the_older_layout_of_an_interface(tmp_path: Path, version: int) -> None:
    out, line = load_into_stub(tmp_path, WHOLE, API_VERSION=version, REGISTRIES=1, OVERHEAD=368, FIRST=7)
    assert out == "None\n"
    assert f"ggml 9.9.9 has an older layout of backend interface {version}: use a release" in line


def test_tensors_of_another_size(tmp_path: Path) -> None:
    out, line = load_into_stub(tmp_path, WHOLE, API_VERSION=2, REGISTRIES=1, OVERHEAD=432, FIRST=9)
    assert out == "None\n"
    assert "ggml 9.9.9 was built with tensors of 432 bytes; supported are those of 368" in line


def load_into_stub(folder: Path, more: str = "", **numbers: int) -> tuple[str, str]:
    stub = folder / "libstub.so"
    compile_c(stub, "".join(f"#define {name} {n}\n" for name, n in numbers.items()) + STUB + more)
    out, errors = run(
        LOADED_BY.format(function="load", arguments="sys.argv[2].encode()"), stub, backend_path()
    )
    (line,) = our_lines(errors)
    return out, line


# ---- A model without attention


def test_model_without_attention(tmp_path: Path) -> None:
    file = tiny_gguf.mamba().write(tmp_path / "mamba.gguf")
    code = (
        HOST
        + """
host = Host(Path(model))
tokens = [token % 256 for token in tokens]
plain, ours = (Context(host, config).extend(tokens) for config in (None, SparseKConfig.pure(8)))
print(np.isfinite(plain).all(), plain.std() > 0, np.array_equal(plain, ours), integration.counts())
"""
    )
    out, _ = run(code, "", file)
    assert out == "True True True Counts(sparse=0, dense=0, by_host=0)\n"


# ---- Threads

TEXT = (
    HOST
    + """
host, threads = Host(Path(model)), int(sys.argv[3])
config = SparseKConfig(top_k=8, sinks=4, window=8, dense_layers=(), min_context=0)
parameters = dict(n_threads=threads, n_threads_batch=threads)
for kept in (KEEP_ALL, config):
    context = Context(host, kept, **parameters)
    logits = [context.extend(tokens)] + [context.extend([token]) for token in tokens[:20]]
    print(np.concatenate(logits)[::7, ::997].ravel().tolist())
"""
)


@pytest.mark.parametrize(("threads", "policy"), [(1, "active"), (4, "active"), (2, "passive")])
def test_threads_change_nothing(model: Path, threads: int, policy: str) -> None:
    expected, _ = run(TEXT, "", model, 2)
    got, _ = run(TEXT, "", model, threads, OMP_WAIT_POLICY=policy)
    for a, b in zip(got.splitlines(), expected.splitlines(), strict=True):
        assert json.loads(a) == pytest.approx(json.loads(b), abs=1e-3)


# ---- Signals

# Says when a prompt begins that takes many seconds.
LONG = """
from sparsek import SparseKConfig
from sparsek.engines.llama import LlamaEngine
engine = LlamaEngine(None, threads=2)
print("begins", flush=True)
list(engine.prompt([504] * 8000, SparseKConfig(top_k=64, min_context=0)))
print("ends")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_signal_in_the_middle_of_a_prompt(model: Path, number: signal.Signals) -> None:
    with start(LONG) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(1)
        process.send_signal(number)
        try:
            out, _ = process.communicate(timeout=HANGS)
        finally:
            process.kill()
    assert process.returncode == -number
    assert "ends" not in out
    out, _ = run(TEXT, "", model, 2)
    assert len(out.splitlines()) == 2
