"""One op a file. Always imported as `harmonica_rt.kernels`."""
