"""fpo eval: one policy, measured and sampled."""
