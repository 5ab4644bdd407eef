# The executor image for YMIR. Build it with: docker build --tag vidt-ymir .
# To use another base image: --build-arg BASE_IMAGE=pytorch/pytorch:TAG (PyTorch 2.8 or later).
ARG BASE_IMAGE=pytorch/pytorch:2.14.1-cuda12.6-cudnn9-runtime
FROM ${BASE_IMAGE}
# Backbones whose ImageNet weights the image includes: --build-arg BODIES="swin_nano swin_tiny".
ARG BODIES=""

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Every user can write to the caches, because the platform decides which user runs a task.
ENV PYTHONUNBUFFERED=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    TORCH_HOME=/opt/vidt/cache/torch \
    HF_HOME=/opt/vidt/cache/huggingface \
    TRITON_CACHE_DIR=/tmp/vidt-triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/vidt-inductor

# On a GPU, Triton compiles its launcher with gcc and Python.h at first use, which a -runtime base lacks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
# The build fails here if the Python of the base cannot compile.
RUN gcc --version \
    && echo '#include <Python.h>' \
    | gcc -E -I"$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')" - > /dev/null

# .dockerignore lists the files that are copied.
COPY . /tmp/vidt/
# Install from wheels only. Keep the PyTorch of the base image, which matches its CUDA.
RUN grep -v '^torch' /tmp/vidt/constraints.txt > /tmp/kept.txt \
    && python3 -m pip list --format=freeze | grep -E '^torch(vision)?==' >> /tmp/kept.txt \
    && python3 -m pip install --no-cache-dir --only-binary :all: --constraint /tmp/kept.txt /tmp/vidt \
    && rm -r /tmp/vidt /tmp/kept.txt

COPY ymir_adapter/templates/ /img-man/
COPY docker/start.sh /usr/bin/start.sh
# Loading the weights once downloads them into the caches.
RUN mkdir -p "$TORCH_HOME" "$HF_HOME" \
    && for backbone in $BODIES; do python3 -c "from vidt.model.vidt import ViDT, ViDTConfig; \
from vidt.weights.pretrained import load_imagenet; \
load_imagenet(ViDT(ViDTConfig(backbone_name='$backbone')).backbone, '$backbone', 'imagenet')" || exit 1; done \
    && chmod -R a+rwX /opt/vidt/cache \
    && chmod -R a+rX /img-man /usr/bin/start.sh

WORKDIR /opt/vidt
# The base's entry point prints a banner, which would spoil the files that the platform reads with `cat`.
ENTRYPOINT []
CMD ["bash", "/usr/bin/start.sh"]
