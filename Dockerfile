# The executor image for YMIR: docker build -t vidt-ymir .
# Another base: --build-arg BASE_IMAGE=pytorch/pytorch:TAG (PyTorch 2.8 or later).
ARG BASE_IMAGE=pytorch/pytorch:2.14.1-cuda12.6-cudnn9-runtime
FROM ${BASE_IMAGE}
# Bodies whose ImageNet weights the image brings along: --build-arg BODIES="swin_nano swin_tiny".
ARG BODIES=""

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The caches may be written by any user: a task runs as one who is not known here.
ENV PYTHONUNBUFFERED=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    TORCH_HOME=/opt/vidt/cache/torch \
    HF_HOME=/opt/vidt/cache/huggingface

# What .dockerignore lets through.
COPY . /tmp/vidt/
# All from ready-made wheels. The base's own PyTorch stays: it is the one built for its CUDA.
RUN grep -v '^torch' /tmp/vidt/constraints.txt > /tmp/kept.txt \
    && python3 -m pip list --format=freeze | grep -E '^torch(vision)?==' >> /tmp/kept.txt \
    && python3 -m pip install --no-cache-dir --only-binary :all: --constraint /tmp/kept.txt /tmp/vidt \
    && rm -r /tmp/vidt /tmp/kept.txt

COPY ymir_adapter/templates/ /img-man/
COPY docker/start.sh /usr/bin/start.sh
# The weights are fetched by being used once.
RUN mkdir -p "$TORCH_HOME" "$HF_HOME" \
    && for body in $BODIES; do python3 -c "from vidt.model.vidt import ViDT, ViDTConfig; \
from vidt.weights.pretrained import load_imagenet; \
load_imagenet(ViDT(ViDTConfig(backbone_name='$body')).backbone, '$body', 'imagenet')" || exit 1; done \
    && chmod -R a+rwX /opt/vidt/cache \
    && chmod -R a+rX /img-man /usr/bin/start.sh

WORKDIR /opt/vidt
# An inherited entry point would print its banner before what the platform reads with `cat`.
ENTRYPOINT []
CMD ["bash", "/usr/bin/start.sh"]
