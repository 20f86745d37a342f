# The quickstart on a GPU machine with NVIDIA's container toolkit, driver 580.65 or newer:
#   docker build -t video-r1 . && docker run --rm --gpus all video-r1
# Keep data and runs: add -v "$PWD/data:/app/data" -v "$PWD/output:/app/output"
FROM python:3.12-bookworm

WORKDIR /app
COPY Makefile requirements*.txt requirements*.lock ./
RUN make .venv/run
COPY . .
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["python", "quickstart.py"]
