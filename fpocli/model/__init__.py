"""The network: packed sequences in, log-probabilities and hidden states out."""
