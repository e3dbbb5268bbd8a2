"""The views of an image: their random numbers, and how PIL and the kernels make them."""
