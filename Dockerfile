# syntax=docker/dockerfile:1
# Two images: `docker build --target cpu -t monofacet:0.1.0-cpu .` and `--target cuda -t monofacet:0.1.0-cuda .`
# They run as any user but root, on a read-only root file system with a writable /tmp. They listen on loopback until
# MONOFACET_HOST and MONOFACET_METRICS_HOST say otherwise: docs/operations.md has the command.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS base
# wget: KubeRay's probes. libgomp1: torch and OpenVINO.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --no-create-home --home-dir /tmp monofacet
# No virtual environment: a login shell, which KubeRay may start Ray with, would not find it.
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /srv/monofacet
# What the dependencies follow from, so that a change of the code does not install them again.
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY clients/python clients/python

FROM base AS dependencies-cuda
# The registry's torch brings CUDA's libraries; the driver is the node's.
RUN pip install --constraint constraints.txt ./clients/python ".[server]"

FROM base AS dependencies-cpu
# An index with torch's CPU wheels. Without it the registry's torch is taken, which runs on CPUs and is 4 GB larger.
ARG TORCH_INDEX=
RUN if [ -n "${TORCH_INDEX}" ]; then \
        pip install --no-deps --constraint constraints.txt --index-url "${TORCH_INDEX}" torch torchvision; \
    fi \
    && pip install --constraint constraints.txt ./clients/python ".[server]"

FROM dependencies-cpu AS cpu
COPY services services
COPY deployments deployments
COPY bundles bundles
# Compiled now: later the file system is read-only.
RUN pip install --no-deps --editable . && python -m compileall -q services deployments
USER 1000:1000
EXPOSE 9000 8080 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["monofacet", "health"]
CMD ["monofacet", "serve"]

FROM dependencies-cuda AS cuda
COPY services services
COPY deployments deployments
COPY bundles bundles
RUN pip install --no-deps --editable . && python -m compileall -q services deployments
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
EXPOSE 9000 8080 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["monofacet", "health"]
CMD ["monofacet", "serve"]
