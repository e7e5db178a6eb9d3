"""Compiled kernels for steps on a CPU. Each has a plain torch twin, which runs where no compiler is found."""
