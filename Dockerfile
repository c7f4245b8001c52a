# Trainings in a container; nbs/clusters.ipynb says how it is used.
#   docker build -t tformer_lab .
#   docker build -t tformer_lab:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# From what changes rarely to what changes often: torch, what else is needed, the package, the notebooks
WORKDIR /src
COPY constraints.txt ./
# Where torch comes from, its version being in constraints.txt. The rest comes from PyPI, CUDA's libraries among it
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --index-url "$TORCH_INDEX" --constraint constraints.txt torch

COPY settings.ini setup.py ./
# "lab,mlflow" for tracking, too
ARG EXTRAS=lab
# setup.py wants a README; the package that is installed with its requirements is empty as yet
RUN touch README.md && pip install --constraint constraints.txt ".[$EXTRAS]"

COPY README.md LICENSE ./
COPY tformer_lab tformer_lab
RUN pip install --no-deps --force-reinstall .

# Any user may run it, such as the one who owns the mounted folder of runs
RUN useradd --uid 1000 --create-home lab && install --directory --mode 1777 /runs && chmod 1777 /home/lab
ENV HOME=/home/lab TFORMER_RUNS=/runs
VOLUME /runs
WORKDIR /lab
COPY nbs nbs
USER 1000
ENTRYPOINT ["papermill"]
CMD ["nbs/train.ipynb", "/runs/out.ipynb"]
