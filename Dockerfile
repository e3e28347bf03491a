# The speedrun in a container.
#
#   docker build -t speedrun .
#   docker run --gpus all --ipc=host -v speedrun-data:/speedrun/data -v "$PWD/runs:/speedrun/runs" speedrun
#
# --ipc=host (or --shm-size=8g): ranks talk through shared memory, and a container's default of 64 MB ends them with a bus error.
# /speedrun/data: FineWeb shards, 0.6 GB for the preset small, 1.6 GB for record, 21 GB for record1. /speedrun/runs: logs, checkpoints, reports.
# The image needs an NVIDIA driver of at least 580 (CUDA 13). Without --gpus it trains the small model of the CPU.

FROM nvidia/cuda:13.0.1-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# g++ for torch.compile, the Python headers for Triton. Versions are the distribution's: a pin would break with its next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ make git ca-certificates \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /speedrun

# The requirements first, so that a changed chapter does not install everything again.
COPY pyproject.toml README.md LICENSE ./
COPY speedrun/__init__.py speedrun/__init__.py
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --editable ".[gpu,book]"
ENV PATH=/opt/venv/bin:$PATH

COPY . .

VOLUME ["/speedrun/data", "/speedrun/runs"]
EXPOSE 8888

# Asks nothing: there is nobody to answer. `docker run … speedrun make lab ARGS="--ip 0.0.0.0 --allow-root"` opens the chapters.
ENV YES=1
CMD ["make", "speedrun", "PYTHON=/opt/venv/bin/python"]
