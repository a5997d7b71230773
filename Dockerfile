# An image that trains and post-processes on H100s: docs/howto/h100.md says how it is run.
# FlashAttention-3 is not in it: put a wheel that names this torch into wheels/ before building.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# Versions of Debian packages are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
# The Triton of this torch interprets kernels, as tests do, on a NumPy before 2.4 (Makefile, test-torches).
RUN python3 -m venv "$VIRTUAL_ENV" && pip install --no-cache-dir "torch==2.11.*" "numpy<2.4"

WORKDIR /app
COPY . .
RUN pip install --no-cache-dir --editable ".[data,pack,test]" \
    && find . -maxdepth 2 -path './wheels/*.whl' -exec pip install --no-cache-dir --no-deps {} +

CMD ["python", "-m", "tests.gpu.session", "--part", "1", "--out", "gpu-session"]
