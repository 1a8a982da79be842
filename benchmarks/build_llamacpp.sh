#!/bin/sh
# Builds llama.cpp's programs and libraries once, from the source distribution of llama-cpp-python on PyPI, which carries all of
# llama.cpp, into the user's cache: what tests marked `llamacpp` and benchmarks/llamacpp.py run.
#
#     sh benchmarks/build_llamacpp.sh PYTHON [JOBS]
#
# Needs a C++ compiler and cmake (Debian's, or `pip install cmake`). Takes some ten minutes on two quiet cores.
set -eu
PYTHON=$1
JOBS=${2:-2}
VERSION=0.3.36
HOME_OF_BUILD="${XDG_CACHE_HOME:-$HOME/.cache}/gptqmodel-eora-ext/llamacpp"
mkdir -p "$HOME_OF_BUILD"
if [ ! -d "$HOME_OF_BUILD/source" ]; then
    "$PYTHON" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$HOME_OF_BUILD" "llama-cpp-python==$VERSION"
    tar -xzf "$HOME_OF_BUILD/llama_cpp_python-$VERSION.tar.gz" -C "$HOME_OF_BUILD"
    rm "$HOME_OF_BUILD/llama_cpp_python-$VERSION.tar.gz"
    mv "$HOME_OF_BUILD/llama_cpp_python-$VERSION" "$HOME_OF_BUILD/source"
fi
# llama.cpp's converter imports the first, whatever the tokenizer; llama-cpp-python the second.
"$PYTHON" -m pip install --quiet --no-deps --target "$HOME_OF_BUILD/python" sentencepiece diskcache
# No web interface (it would be fetched), no curl, no TLS: nothing here reads the network.
cmake -S "$HOME_OF_BUILD/source/vendor/llama.cpp" -B "$HOME_OF_BUILD/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF -DGGML_CCACHE=OFF
cmake --build "$HOME_OF_BUILD/build" --parallel "$JOBS" --target llama-quantize llama-perplexity llama-completion \
    llama-imatrix llama-bench llama-gguf-split llama-cli llama-server
