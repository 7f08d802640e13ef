# Two images from one file: `api` has no torch; `worker` runs trainer, sweeper and engine.
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN useradd --create-home --uid 10001 uora && mkdir -p /data && chown uora /data
WORKDIR /app
COPY pyproject.toml requirements.lock README.md ./
COPY uora uora
COPY api api
COPY worker worker
COPY cli cli

FROM base AS api
# The lock pins the versions, the extra chooses what is installed.
RUN pip install --constraint requirements.lock '.[api,tracing]'
COPY alembic.ini ./
COPY migrations migrations
USER uora

FROM base AS worker
RUN pip install --constraint requirements.lock '.[worker,quantized,tracing,wandb]'
USER uora
