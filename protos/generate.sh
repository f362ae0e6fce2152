#!/bin/sh
# Regenerates the stubs beside their .proto files, with the pinned generator in an environment of its own.
# usage: protos/generate.sh [OUTPUT_FOLDER]   (default: protos, in place)
set -eu
cd "$(dirname "$0")/.."
out=${1:-protos}
tools=build/protoc
if [ ! -x "$tools/bin/python" ]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check grpcio-tools==1.78.0 mypy-protobuf==5.0.0
fi
mkdir -p "$out"
PATH="$PWD/$tools/bin:$PATH" "$tools/bin/python" -m grpc_tools.protoc -I protos \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    protos/pagestream/v1/*.proto
