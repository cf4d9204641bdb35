"""The Triton kernels on a GPU: right against float64, and how long they take, alone and in a layer."""
