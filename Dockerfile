# Two images from one file. `light` has no torch and runs the registry and the gateway; `full` runs all four:
#
#     docker build --target light --tag lorafleet:light .
#     docker build --target full --tag lorafleet:full .
#
# The service is the command: docker run lorafleet:light services.registry
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# The pins alone first, so that a change of the code does not download them again.
FROM ${PYTHON_IMAGE} AS light-pins
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/lorafleet
ENV PATH=/opt/lorafleet/bin:$PATH
WORKDIR /src
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /tmp/pins \
    && pip install --requirement /tmp/pins

FROM light-pins AS full-pins
# Where torch comes from; empty for the usual index. PyTorch's own index of CPU builds makes a far smaller image.
ARG TORCH_INDEX_URL=
RUN python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*[pin for pin in extras['inference'] + extras['trainer'] if not pin.startswith('lorafleet')], sep='\n')" > /tmp/pins \
    && pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' /tmp/pins)" \
    && pip install --requirement /tmp/pins

# In a folder of its own: another version of the code makes another small layer upon the one of the pins.
FROM ${PYTHON_IMAGE} AS code
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY lorafleet lorafleet
COPY services services
RUN pip install --no-deps --target /opt/code .

FROM ${PYTHON_IMAGE} AS runtime
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lorafleet \
    && install -d -o lorafleet -g lorafleet /var/lib/lorafleet
ENV PATH=/opt/lorafleet/bin:$PATH PYTHONPATH=/opt/code PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp HF_HUB_OFFLINE=1
# What the health check asks: HOST:PORT of a gRPC service, or a URL.
ENV PROBE_TARGET=127.0.0.1:7101
USER lorafleet
WORKDIR /var/lib/lorafleet
ENTRYPOINT ["python", "-m"]
# The time-out covers the start of the process that asks, on a machine with much else to do.
HEALTHCHECK --interval=5s --timeout=20s --start-period=120s --retries=6 \
    CMD ["sh", "-c", "exec python -m services.common.probe \"$PROBE_TARGET\""]

FROM runtime AS light
COPY --from=light-pins /opt/lorafleet /opt/lorafleet
COPY --from=code /opt/code /opt/code
CMD ["services.gateway"]

FROM runtime AS full
# The engine compiles its kernels at its first start, on a CPU as on a GPU; without a compiler it runs their slower twins.
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER lorafleet
# On a volume: /tmp may forbid to load code from it.
ENV XDG_CACHE_HOME=/var/lib/lorafleet/cache TRITON_CACHE_DIR=/var/lib/lorafleet/cache/triton
COPY --from=full-pins /opt/lorafleet /opt/lorafleet
COPY --from=code /opt/code /opt/code
CMD ["services.inference"]
