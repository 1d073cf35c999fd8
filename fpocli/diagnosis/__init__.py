"""`fpo doctor`: what is on a machine, and whether fpo's kernels are right there."""
