"""What compilers make of the GPU kernels, without a GPU: compiled for several, and their machine code read.

    python -m benchmarks.static_gate               against benchmarks/results/static.json; fails if a kernel got worse
    python -m benchmarks.static_gate --write       the figures into that file
    python -m benchmarks.static_gate --only WORD   kernels whose name has this word
    python -m benchmarks.static_gate --markdown    the tables of docs/gpu.md, from that file; compiles nothing

On NVIDIA the hot loops are found in what nvdisasm, part of Triton's package, prints (`sass.py`). A hot loop walks whole
blocks of columns: it reads logits without a mask, all of them 16 bytes at a time, and its lanes exchange nothing. Held
to account are its instructions a column, whatever the compiler's version; and, where the committed figures come from
the compiler that is installed, more instructions, special functions (MUFU) or registers than there (`gate.py`).

`triton_kernels.py` compiles with Triton, for AMD too, where the kernels must compile; `cuda_kernels.py` with nvcc,
where there is one.
"""
