# CPU:   docker build -t mae-et .
# CUDA:  docker build -t mae-et:cuda --build-arg BASE=pytorch/pytorch:2.14.1-cuda13.0-cudnn9-runtime --build-arg EXTRAS=fast,gpu .
# Run:   docker run --rm --gpus all --shm-size 16g --user $(id -u):$(id -g) -v /path/to/imagenet:/data:ro \
#          -v $PWD/runs:/workspace/runs mae-et:cuda pretrain --config pretrain/vit_b16_etpp_hog_400ep --data.root /data
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=fast

# A C compiler, for torch.compile.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# The base's own PyTorch is kept where it has one; the lock fixes the other versions.
COPY setup.cfg pyproject.toml README.md LICENSE /src/
COPY requirements /src/requirements
COPY mae_et /src/mae_et
COPY finetune /src/finetune
COPY slurm /src/slurm
COPY configs /src/configs
COPY benchmarks /src/benchmarks
RUN grep -vE '^(torch|torchvision)==' /src/requirements/lock.txt > /tmp/lock.txt \
 && pip install --no-cache-dir --constraint /tmp/lock.txt "/src[${EXTRAS}]" \
 && rm -rf /src /tmp/lock.txt \
 && mae-et --version

# Not root. Bases may have a user of this number, or a /workspace of root's.
RUN useradd --create-home --non-unique --uid 1000 mae && install --directory --owner mae /workspace
USER mae
WORKDIR /workspace
ENTRYPOINT ["mae-et"]
CMD ["--help"]
