"""How fast flexnorm is, against the memory and against the best that others have: `python -m benchmarks`."""
