"""The fast ones, under the same names: `_cpu` is built from the C++ sources in cpu/, where a compiler is found."""
