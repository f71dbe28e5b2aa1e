# Images of megasd. They need BuildKit (docker build, buildx) or buildah.
#
#   docker build --target trainer   -t megasd:trainer .     training: torch, Megatron-core, TransformerEngine, flash-attention, apex
#   docker build --target engine    -t megasd:engine .      rollouts on nodes of their own: SGLang (megasd serve)
#   docker build --target colocated -t megasd .             both, each in its own environment, for engines that share the trainer's GPUs
#   docker build --target cpu       -t megasd:cpu .         the quickstart, on a laptop
#   docker build --target smoke --build-arg SMOKE_OF=cpu .  builds only if that image holds together (docker/smoke.sh)
#
# Trainer and engine ask for different torch versions, so they never share an environment; in `colocated` the trainer starts engines with
# the python that MEGASD_ENGINE_PYTHON names. Versions of Python packages come from pyproject.toml, by docker/pins.py; what is compiled
# against torch is pinned below. Behind a mirror: --secret id=pip.conf,src=$HOME/.config/pip/pip.conf (it leaves no trace in the image).
# The base images are pinned by tag and digest; a mirror of them goes in with --build-arg.
ARG CUDA_IMAGE=nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04@sha256:0230b7f243483cb15969fa3cc724a9459599604427052fc2a0d4291c7c0647dd
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
ARG SMOKE_OF=colocated


# ---- what GPU images share: CUDA 13.0 as torch's wheels, its compiler (Triton, TransformerEngine and SGLang compile at run time), Python
FROM ${CUDA_IMAGE} AS cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        bubblewrap=0.9.0-* \
        build-essential=12.10ubuntu1 \
        ca-certificates=2* \
        git=1:2.43.0-* \
        ibverbs-providers=50.0-* \
        libibverbs1=50.0-* \
        libnuma1=2.0.18-* \
        python3.12=3.12.3-* \
        python3.12-dev=3.12.3-* \
        python3.12-venv=3.12.3-* \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 megasd \
    && useradd --uid 10001 --gid 10001 --create-home --no-log-init --shell /bin/bash megasd \
    && install --directory --owner=megasd --group=megasd /workspace
WORKDIR /workspace


# ---- the trainer's environment, /opt/trainer
FROM cuda AS trainer-build
ARG MAX_JOBS=8
# Hopper; both spellings: "9.0;10.0" and "90;100" for Blackwell as well.
ARG TORCH_ARCHS=9.0
ARG NVCC_ARCHS=90
WORKDIR /build
RUN python3.12 -m venv /opt/trainer
ENV PATH=/opt/trainer/bin:${PATH} MAX_JOBS=${MAX_JOBS} TORCH_CUDA_ARCH_LIST=${TORCH_ARCHS}
COPY pyproject.toml docker/pins.py ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python pins.py trainer >trainer.txt \
    && pip install --requirement trainer.txt setuptools==80.9.0 wheel==0.45.1 ninja==1.13.0 pybind11==3.0.1 \
    && pip freeze >built-against.txt
# Compiled against the torch above; --constraint keeps it, and everything else, as it is.
ARG TE_VERSION=2.11.0
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="${NVCC_ARCHS}" NVTE_BUILD_THREADS_PER_JOB=2 \
    pip install --no-build-isolation --constraint built-against.txt "transformer-engine[core-cu13,pytorch]==${TE_VERSION}"
# TransformerEngine 2.11 takes flash-attention up to 2.8.3 and passes over 2.8.3.post*.
ARG FLASH_ATTN_VERSION=2.8.3
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS="${NVCC_ARCHS}" \
    pip install --no-build-isolation --no-deps "flash-attn==${FLASH_ATTN_VERSION}"
# NVIDIA's apex has no releases on PyPI (what is called apex there is a web toolkit). APEX_COMMIT= leaves it out: Megatron does without.
ARG APEX_COMMIT=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    if [ -n "${APEX_COMMIT}" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="${MAX_JOBS}" NVCC_APPEND_FLAGS="--threads 2" \
        pip install --no-build-isolation --no-deps "apex @ git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}"; \
    fi
COPY README.md ./
COPY megasd ./megasd
RUN pip install --no-build-isolation --no-deps .


# ---- the engines' environment, /opt/engine
FROM cuda AS engine-build
WORKDIR /build
RUN python3.12 -m venv /opt/engine
ENV PATH=/opt/engine/bin:${PATH}
COPY pyproject.toml docker/pins.py ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python pins.py engine >engine.txt \
    && pip install --requirement engine.txt setuptools==80.9.0 wheel==0.45.1
# Without its dependencies: `megasd serve`, and the start of a server whose key is in the environment, need no more than is there.
COPY README.md ./
COPY megasd ./megasd
RUN pip install --no-build-isolation --no-deps .


FROM cuda AS trainer
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megasd trainer" \
    org.opencontainers.image.description="Self-distillation at scale: the trainer" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="docker.io/nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04"
COPY --from=trainer-build /opt/trainer /opt/trainer
COPY configs /opt/megasd/configs
ENV PATH=/opt/trainer/bin:${PATH}
USER 10001:10001
CMD ["megasd", "doctor"]


FROM cuda AS engine
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megasd engine" \
    org.opencontainers.image.description="Self-distillation at scale: SGLang engines for rollouts" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="docker.io/nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04"
COPY --from=engine-build /opt/engine /opt/engine
COPY configs /opt/megasd/configs
ENV PATH=/opt/engine/bin:${PATH}
USER 10001:10001
CMD ["megasd", "serve", "--help"]


FROM trainer AS colocated
LABEL org.opencontainers.image.title="megasd" \
    org.opencontainers.image.description="Self-distillation at scale: trainer and SGLang engines, an environment each"
COPY --from=engine-build /opt/engine /opt/engine
ENV MEGASD_ENGINE_PYTHON=/opt/engine/bin/python


# ---- the quickstart, without a GPU
FROM ${PYTHON_IMAGE} AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megasd cpu" \
    org.opencontainers.image.description="Self-distillation at scale: the quickstart on a CPU" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="docker.io/library/python:3.11.14-slim-bookworm"
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap=0.8.0-* build-essential=12.9 git=1:2.39.* \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 megasd \
    && useradd --uid 10001 --gid 10001 --create-home --no-log-init --shell /bin/bash megasd \
    && install --directory --owner=megasd --group=megasd /megasd
WORKDIR /megasd
USER 10001:10001
COPY --chown=megasd:megasd Makefile pyproject.toml README.md ./
COPY --chown=megasd:megasd megasd ./megasd
COPY --chown=megasd:megasd configs ./configs
COPY --chown=megasd:megasd tools ./tools
# torch from PyPI brings 3 GB of CUDA along; this index has the same version without.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 \
    PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" make install
ENV PATH=/megasd/.venv/bin:${PATH}
CMD ["make", "quickstart"]


# ---- builds only where the image it stands on holds together
FROM ${SMOKE_OF} AS smoke
COPY docker/smoke.sh tools/make_quickstart.py configs/quickstart.yaml /smoke/
RUN ["/smoke/smoke.sh", "--build"]
CMD ["/smoke/smoke.sh"]
