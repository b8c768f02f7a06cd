# `miaformer serve` on processors: a user without rights, a health check.
#   docker build --secret id=pip,src=pip.conf -t miaformer .    (docs/deploy/container.md)
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/photos/model:/model:ro" miaformer
# To bake a model in: FROM miaformer, then COPY runs/photos/model /model
FROM python:3.12-slim AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY src src
# The secret is a configuration of pip that finds PyTorch's CPU wheels. Without it torch's wheels for Linux hold CUDA: gigabytes.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv /opt/miaformer \
    && /opt/miaformer/bin/pip install --no-cache-dir "torch>=2.11" torchvision
RUN /opt/miaformer/bin/pip install --no-cache-dir ".[serve,fast,onnx]"

FROM python:3.12-slim
COPY --from=build /opt/miaformer /opt/miaformer
# What the engine `auto` exports and times is kept here: mount a volume to keep it from run to run.
RUN useradd --system --uid 10001 --no-create-home miaformer \
    && install --directory --owner miaformer /var/cache/miaformer
ENV PATH=/opt/miaformer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MIAFORMER_CACHE=/var/cache/miaformer \
    NUMBA_CACHE_DIR=/var/cache/miaformer
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["miaformer", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
