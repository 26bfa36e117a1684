# abyssal serve on port 8000, with the bundled model unless told otherwise:
#   docker build -t abyssal . && docker run -p 127.0.0.1:8000:8000 -e ABYSSAL_API_KEYS=secret abyssal
FROM python:3.12-slim
# plain torch brings CUDA, gigabytes of it: --build-arg TORCH="torch --index-url URL-OF-PYTORCH'S-CPU-INDEX"
ARG TORCH=torch
RUN pip install --no-cache-dir ${TORCH}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY abyssal ./abyssal
RUN pip install --no-cache-dir . && rm -rf /src
RUN useradd --create-home abyssal && mkdir /data && chown abyssal /data
USER abyssal
WORKDIR /data
ENV ABYSSAL_HOME=/data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
  CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready')"
# in a container every address is reachable from outside, so a key is needed
ENTRYPOINT ["abyssal"]
CMD ["serve", "--host", "0.0.0.0"]
