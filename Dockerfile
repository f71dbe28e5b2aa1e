# A CPU image of the quickstart. The GPU image comes with the launchers.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git bubblewrap && rm -rf /var/lib/apt/lists/*
WORKDIR /megasd
COPY . .
RUN make install
CMD ["make", "quickstart"]
