# The serving side: gtr-run with ONNX Runtime on the CPU, no PyTorch. Mount bundles at /bundles:
#   docker build -t gtr-run . && docker run --rm -v ./bundles:/bundles -v ./out:/out gtr-run \
#     generate /bundles/mar-digits-fp32 --classes 3 --out /out
# For NVIDIA GPUs take an image with CUDA and the extra gpu or tensorrt. Not yet built by this project's own CI.
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
COPY --from=build /wheels /wheels
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /wheels/*.whl)[cpu]" && rm -r /wheels \
    && useradd --create-home gtr
USER gtr
WORKDIR /home/gtr
ENTRYPOINT ["gtr-run"]
