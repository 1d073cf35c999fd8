"""Flags and defaults that several commands have in common."""

from typer import Option

DEFAULT_DATA = "HuggingFaceH4/ultrafeedback_binarized"


TRUST_REMOTE_CODE = Option(
    "--trust-remote-code",
    help="Run Python code that comes with the models. Not allowed in a YAML file.",
)


PACKED_LENGTH_HELP = (
    "Tokens of one packed sequence, in which several pairs are scored at once. More is faster up "
    "to a point and takes more memory. Default: 8192 on a GPU, 2048 on a CPU."
)
