# For GPUs:  docker build -t fpo .
#            docker run --gpus all -v $PWD:/work fpo cache --model gemma-2-2b --layer 25
# The devel image has the compiler and headers that DeepSpeed's CUDA operators ask for.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/fpo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fpocli fpocli
RUN pip install --no-cache-dir -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt ".[cuda]"
WORKDIR /work
ENTRYPOINT ["fpo"]
