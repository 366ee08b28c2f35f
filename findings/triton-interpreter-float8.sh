#!/usr/bin/env bash
# Triton's interpreter rounds numbers to float8 (e4m3) by cutting bits off: what should carry into the next power of two,
# falls to the last one. PyTorch's conversion is the yardstick.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check triton==3.7.1 torch==2.13.0 numpy==2.2.6 2>&1 | grep -v '^WARNING' || true
cat > "$folder/kernel.py" <<'PYTHON'
import sys
import torch, triton
import triton.language as tl

@triton.jit
def convert(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.float8e4nv))

x = torch.tensor([1.97, -1.97, 3.9, 500.0, 1.9, 3.3, 17.9, 0.3])
y = torch.empty(8, dtype=torch.float8_e4m3fn)
convert[(1,)](x, y, 8)
expected = x.to(torch.float8_e4m3fn).float().tolist()
print("triton", triton.__version__, "interpreted; torch", torch.__version__)
print("given      ", [round(v, 2) for v in x.tolist()])
print("PyTorch    ", expected)
print("interpreter", y.float().tolist())
sys.exit(0 if y.float().tolist()[0] == 1.0 and expected[0] == 2.0 else 1)
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernel.py"
