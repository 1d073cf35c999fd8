# For GPUs:  docker build -t fpo .
#            docker run --gpus all fpo doctor
#            docker run --gpus all -v "$PWD":/work \
#                -v ~/.cache/huggingface:/home/fpo/.cache/huggingface \
#                fpo cache --model gemma-2-2b-it --layer 25
# It has been linted and tested in part, but never built: there was no docker.

FROM ubuntu:24.04 AS build
# Ubuntu removes old versions from its archive, so pinned ones would soon break the build.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/fpo
# The dependencies, torch with its CUDA libraries among them, are a layer that no change of the code
# makes again.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        names = [*extras['cuda'], *extras['cloud'], *extras['ray']]; \
        print(*project['dependencies'], *names, sep='\n')" \
        > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY fpocli fpocli
RUN pip install --no-cache-dir --no-deps .

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
# With gcc and Python's headers Triton compiles what starts its kernels. nvcc is not needed, since
# DeepSpeed compiles nothing for fpo's own settings.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --uid 1000 --create-home fpo \
    && install --directory --owner fpo /work
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
USER 1000
WORKDIR /work
ENTRYPOINT ["fpo"]
