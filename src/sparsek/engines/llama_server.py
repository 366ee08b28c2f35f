"""llama.cpp's HTTP server, which the package xllamacpp carries, with Sparse-K as its attention."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NoReturn

from ..config import SparseKConfig
from ..extras import how_to_install
from ..integrations import llama_cpp as integration
from . import gguf_model
from .base import check_fits
from .gguf_model import GgufModel, not_finite, shard_path
from .llama_model import LlamaModel
from .model_file import find_model, utf8_way_to
from .server_log import Answer, ServerLog, Tap, to_standard_error

_logger = logging.getLogger(__name__)
_CELLS: Final = 256  # llama.cpp's contexts come in whole ones of these
_INFORMATION: Final = 3  # a level of llama.cpp's log
# A prompt, that is more queries at once than the backend takes for generation; and for very short contexts.
_SOME_WORDS, _A_WORD = "a b c d e f g h i j k l", "The"
_ROOM_FOR_WORDS: Final = 64  # tokens of context
_LONGEST_DEFAULT: Final = 32768  # memory for the keys and values of the context is taken at the start
_ENDING: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class ServableModel:
    """A model's files, its layers, the most tokens it takes, and the configuration it carries, or None."""

    files: GgufModel
    num_layers: int
    context_length: int
    config: SparseKConfig | None

    def context(self, wanted: int | None) -> int:
        """Tokens of one request: `wanted`, or a default; llama.cpp makes it a multiple of _CELLS. Raises
        ValueError when the model has fewer."""
        if wanted is None:
            wanted = min(self.context_length, _LONGEST_DEFAULT)
        check_fits(wanted, self.context_length)
        return min(-(-wanted // _CELLS) * _CELLS, self.context_length)


def read_model(model: str | None) -> ServableModel:
    """Look at a model's metadata; the embedded one when `model` is None.

    Raises:
        FileNotFoundError, ValueError: as `find_model`. ImportError: xllamacpp is not installed.
    """
    if find_spec("xllamacpp") is None:
        raise ImportError(f"the server is not installed: {how_to_install('llama')}")
    path = find_model(model)
    if not path.is_file():
        raise ValueError(f"the server needs a GGUF file: {path}")
    files = gguf_model.read_model(path)
    length, layers = (files.of_model(name) for name in ("context_length", "block_count"))
    if not all(isinstance(number, int) and number > 0 for number in (length, layers)):
        raise ValueError(f"the GGUF file does not say how long a context its model takes: {path}")
    return ServableModel(files, layers, length, SparseKConfig.from_gguf_metadata(files.metadata))


def start(
    model: ServableModel,
    config: SparseKConfig | None,
    *,
    host: str,
    port: int,
    context: int,
    parallel: int,
    threads: int,
    metrics: bool,
    api_keys: Sequence[str],
    describe: Callable[[Answer], str],
) -> Any:
    """A server that answers in the background; it has a `listening_address`. `config` None leaves attention
    to llama.cpp. While it loads, Ctrl-C and SIGTERM end the process at once. From then on every answer is a
    line on standard error, as `describe` has it.

    Args:
        port: 0 for any that is free.
        context: tokens of one request, prompt and answer together.
        parallel: requests answered at the same time; the others wait.
        metrics: whether it has /metrics.
        api_keys: requests must carry one of these, if there are any.

    Raises:
        OSError: the address cannot be listened on. ImportError: xllamacpp does not take the backend.
        ValueError: llama.cpp cannot load the model, or it does not continue texts.
    """
    import xllamacpp

    _check_address(host, port)
    LlamaModel(model.files, weights=False)  # what is wrong with it the server would say in many lines, or not
    integration.configure(config)
    params = _params(host, port, context * parallel, parallel, threads)
    params.endpoint_metrics, params.api_keys = metrics, list(api_keys)
    params.model_alias = {model.files.name}  # the name in answers; it would be the whole path
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)  # Python's own handler would wait for the load
    files = model.files.files
    names = [shard_path(Path(), "model", i, len(files)).name for i in range(len(files))]
    log = ServerLog(
        describe,
        to_standard_error,
        min_context=0 if config is None else config.min_context,
        show=_logger.isEnabledFor(logging.DEBUG),
        unsaid=1,
    )
    with utf8_way_to(files, names) as way:  # xllamacpp makes UTF-8 of it
        params.model.path = str(way)
        tap = Tap(log.feed)
        try:
            server = xllamacpp.Server(params)
        except RuntimeError:
            tap.close()
            raise ValueError(f"llama.cpp cannot serve {model.files.path}: the lines above say why") from None
    if not _is_finite(server, _SOME_WORDS if context >= _ROOM_FOR_WORDS else _A_WORD):
        raise not_finite(model.files.name)
    return server


def takes_attention() -> bool:
    """Whether the attention of the model that was started is Sparse-K's, and not llama.cpp's own."""
    done = integration.counts()
    return done.sparse + done.dense > 0


def serve_until_signal() -> NoReturn:
    """Wait for Ctrl-C or SIGTERM, then end the process with code 0.

    The server is not asked to end: it would wait for ever for an answer that it has just broken off.
    """
    stopped = threading.Event()
    for number in _ENDING:
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    done = integration.counts()
    _logger.debug(
        "attention operations: %d with Sparse-K, %d with our dense kernel, %d given back to llama.cpp",
        done.sparse,
        done.dense,
        done.by_host,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _is_finite(server: Any, prompt: str) -> bool:
    """Whether the model says something, which the server itself does not look at."""
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    choices = server.handle_completions(asked).get("choices", [])
    said = [token for choice in choices for token in (choice.get("logprobs") or {}).get("content", [])]
    return all(token["logprob"] is not None for token in said)


def _check_address(host: str, port: int) -> None:
    """The server would only say that it could not start."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from None


def _params(host: str, port: int, tokens: int, parallel: int, threads: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.hostnames, params.port = [host], port
    params.n_ctx, params.n_parallel = tokens, parallel
    params.fit_params = False  # it would make the context shorter without a word
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads
    params.verbosity = _INFORMATION
    return params
