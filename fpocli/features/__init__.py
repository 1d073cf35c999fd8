"""SAEs: sites, encoders, pooled features, their distance and weights."""
