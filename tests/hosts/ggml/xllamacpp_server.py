"""xllamacpp's server with its defaults: python xllamacpp_server.py MODEL PORT

The backend of the variable GGML_BACKEND_PATH, if any, is loaded first: this build has its backends built in,
and does not read the variable by itself.
"""

import contextlib
import ctypes
import os
import pathlib
import sys
import threading

import xllamacpp

if path := os.environ.get("GGML_BACKEND_PATH"):
    (library,) = pathlib.Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    assert ctypes.CDLL(str(library)).ggml_backend_load(path.encode()), "refused"
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.port = sys.argv[1], 4096, int(sys.argv[2])
server = xllamacpp.Server(params)
with contextlib.suppress(KeyboardInterrupt):  # end as programs do, not by the signal
    threading.Event().wait()
