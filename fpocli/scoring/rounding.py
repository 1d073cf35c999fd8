"""How far scores of the same weights and tokens may be apart."""

# The largest difference that rounding explains, by the dtype of the model: of S in nats per token,
# and of D as a share of the features' mean square. On a GPU, and with AMX, bfloat16 products depend
# on the number of rows.
LARGEST_GAP = {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.03}
# Where the dtype is another.
LARGEST_GAP_OF_DTYPES = 0.3
