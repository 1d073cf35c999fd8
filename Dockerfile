# For GPUs:  docker build -t fpo .
#            docker run --gpus all -v $PWD:/work fpo cache --model gemma-2-2b --layer 25
FROM python:3.11-slim

# DeepSpeed compiles its fused kernels, where they are asked for, on first use.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/fpo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fpocli fpocli
RUN pip install --no-cache-dir -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt .
WORKDIR /work
ENTRYPOINT ["fpo"]
