"""fpo cache: the frozen reference and its SAEs -> a store."""
