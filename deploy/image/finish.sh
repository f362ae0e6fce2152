#!/bin/sh
# The last build step of deploy/Containerfile: pagestream and its compiled kernels into the environment of the PATH,
# then out of it what no running server reads (torch: 754 MB before, 455 after). With --cuda also kernels for GPUs.
set -eu
prefix=$(python -c 'import sys; print(sys.prefix)')
pip install --no-deps --no-build-isolation .
pip check
cp "$(XDG_CACHE_HOME=/tmp/kernels python -m pagestream.kernels.build "$@")" "$prefix/lib/"

packages=$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
rm -rf "$packages/torch/test" "$packages/torch/include" "$packages/torch/share"
find "$packages/torch/bin" -type f ! -name torch_shm_manager -delete  # without that one torch cannot be imported
rm -f "$packages"/torch/lib/*test*.so
find "$packages" -type d \( -name tests -o -name include \) -prune -exec rm -rf {} +
find "$packages" -type f \( -name '*.a' -o -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
    -o -name '*.pyx' -o -name '*.pxd' \) -delete
strip --strip-unneeded "$packages"/torch/lib/*.so*
