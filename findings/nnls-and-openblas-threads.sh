#!/usr/bin/env bash
# scipy.optimize.nnls of a 25,600 x 6 matrix takes many times the processor time with OpenBLAS's threads at their
# default, one a core, than with one thread, for the same solution: the threads spin while they wait for each other.
# Expected: threads that do not help cost little. A thin QR before it, nnls(R, Q^T b), is as good as one thread.
# Linux with at least 2 cores, Python 3.11. Exits 0 while scipy and OpenBLAS behave as described (at least 5 times).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-cache-dir scipy==1.17.1 numpy==2.4.6
cat > "$folder/tall.py" <<'PYTHON'
import statistics
import time

import numpy as np
from scipy.optimize import nnls

generator = np.random.default_rng(0)
A = generator.random((25_600, 6))
b = A @ np.array([0, 1, 0.5, 0, 2, 0]) + 0.01 * generator.random(25_600)
times = []
for _ in range(15):
    started = time.process_time()
    solution = nnls(A, b)[0]
    times.append(time.process_time() - started)
print(1e3 * statistics.median(times), *solution)
PYTHON
threads() { env -u OMP_NUM_THREADS -u OPENBLAS_NUM_THREADS "$@" "$folder/venv/bin/python" "$folder/tall.py"; }
threads > "$folder/default"
threads OPENBLAS_NUM_THREADS=1 > "$folder/one"
"$folder/venv/bin/python" - "$folder/default" "$folder/one" <<'PYTHON'
import sys

import numpy as np
import scipy

many, one = (np.loadtxt(path) for path in sys.argv[1:])
print("scipy", scipy.__version__, "numpy", np.__version__)
print(f"processor time of nnls(A, b): {many[0]:.1f} ms with default threads, {one[0]:.1f} ms with one thread")
print(f"largest difference of the solutions: {abs(many[1:] - one[1:]).max():.1e}")
sys.exit(0 if many[0] > 5 * one[0] and abs(many[1:] - one[1:]).max() < 1e-10 else 1)
PYTHON
