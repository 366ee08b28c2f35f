#!/usr/bin/env bash
# torch.compile on the CPU fails where PyTorch is installed in a folder whose name has a space: the folder of its libraries is
# given to the linker as two words. Everything else of PyTorch works there. Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/with space"
"$folder/with space/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.2.6 2>&1 | grep -v '^WARNING' || true
cat > "$folder/program.py" <<'PYTHON'
import sys
import torch

x = torch.ones(64)
print("torch", torch.__version__, "; eager:", (x.sin() + 1).sum().item())
try:
    print("compiled:", torch.compile(lambda x: (x.sin() + 1).sum())(x).item())
except Exception as error:
    found = [line.strip() for line in str(error).splitlines() if "cannot find" in line]
    print("compiled:", type(error).__name__, *found, sep="\n  ")
    sys.exit(0 if found else 1)
sys.exit("compiled: works, so this is no finding any more")
PYTHON
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/with space/bin/python" "$folder/program.py"
