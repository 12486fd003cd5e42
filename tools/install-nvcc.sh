#!/usr/bin/env bash
# Installs NVIDIA's compiler from PyPI, for machines without a CUDA toolkit, and prints the settings:
#
#     eval "$(tools/install-nvcc.sh [FOLDER])"
#
# That is enough to compile everything behind the feature `cuda` (cargo check, cargo clippy). Linking a
# program also takes the CUDA libraries (cudart, cublas, curand, nvrtc) and the driver.
set -euo pipefail

folder=${1:-$HOME/.cache/candle-cut-cross-entropy/cuda-13.0}
nvcc() { compgen -G "$folder/lib/python3*/site-packages/nvidia/cu13/bin/nvcc"; }

if ! nvcc >/dev/null; then
    python3 -m venv "$folder" >&2
    "$folder/bin/pip" install --quiet --disable-pip-version-check \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2
fi
home=$(nvcc)
home=${home%/bin/nvcc}

# Nothing is asked of a GPU while building: without one, name the compute capability.
printf 'export CUDA_HOME=%q CUDA_PATH=%q\n' "$home" "$home"
printf 'export PATH=%q:"$PATH"\n' "$home/bin"
printf 'export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"\n'
