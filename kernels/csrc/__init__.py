"""C++ and CUDA sources, shipped in the wheel and compiled on the user's machine."""
