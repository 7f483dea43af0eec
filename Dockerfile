# CPU:  docker build -t ephemera .
# CUDA: docker build -t ephemera --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# Run:  docker run -p 8000:8000 -e EPHEMERA_API_KEYS=choose-one -v ephemera:/cache ephemera [serve's options]
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN useradd --create-home ephemera && mkdir /cache && chown ephemera /cache
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
COPY examples examples
RUN pip install --no-cache-dir "torch==${TORCH}" --index-url "${TORCH_INDEX}" \
 && grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
 && pip install --no-cache-dir --constraint /tmp/constraints.txt ".[serve]"
USER ephemera
ENV EPHEMERA_HOME=/cache HF_HOME=/cache/huggingface
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"
# EPHEMERA_API_KEYS must be set: serve refuses to listen beyond the machine without a key
ENTRYPOINT ["ephemera", "serve", "--host", "0.0.0.0"]
