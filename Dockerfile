# Training and inference with all of SSCloud, on an NVIDIA GPU (driver 580 or newer) or without one.
#
#   docker build -t s3d .
#   docker run --gpus all -p 8888:8888 --shm-size 2g -v "$PWD:/app" s3d
#
# /app is the working folder: data/imgs, data/masks and checkpoints/ are found there. The code is in /opt/sscloud, where
# a mount of /app does not hide it. Jupyter prints its address with a token.
FROM python:3.11-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/home/s3d

# A layer of its own for what is large and rarely changes. torch's wheels bring CUDA 13.0.
RUN pip install torch==2.13.0 jupyterlab==4.6.6

# The same user number as the first user of most Linux machines, so that files in the mounts are that user's.
# `docker run --user "$(id -u):$(id -g)"` works too: the home folder is open to everybody.
RUN useradd --uid 1000 --create-home --home-dir /home/s3d s3d \
    && chmod 0777 /home/s3d \
    && mkdir /app \
    && chown s3d:s3d /app

COPY . /opt/sscloud
RUN pip install --editable '/opt/sscloud[all]'

# By number: what runs the container need not know the name.
USER 1000
WORKDIR /app
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--ServerApp.root_dir=/app"]
