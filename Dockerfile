# The demo in a container:
#   docker build -t megatron_mm . && docker run --rm -it megatron_mm
# With GPUs: add --gpus all --shm-size 8g. Any other run:
#   docker run ... megatron_mm launch/torchrun.sh experiment=demo run.name=mine
FROM python:3.12-slim

ARG TORCH=torch==2.13.0

# Triton compiles its launchers with the host's C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 trainer \
    && install --directory --owner=1000 /workspace

USER 1000
WORKDIR /workspace
ENV PATH="/workspace/.venv/bin:$PATH"

# The largest layer depends on the Makefile alone.
COPY --chown=1000 Makefile ./
RUN make TORCH="$TORCH" .venv/bin/.torch

COPY --chown=1000 . .
RUN make TORCH="$TORCH" data

CMD ["make", "train"]
