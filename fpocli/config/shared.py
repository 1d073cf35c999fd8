"""Flags and defaults that several commands have in common."""

from typer import Option

DEFAULT_DATA = "HuggingFaceH4/ultrafeedback_binarized"


TRUST_REMOTE_CODE = Option(
    "--trust-remote-code",
    help="Run the Python code that the models bring with them. A YAML file cannot ask for it.",
)


PACKED_LENGTH_HELP = (
    "Tokens of one packed row, which is scored at once; pairs share rows. More is faster up to a "
    "point and takes more memory. Default: 8192 on a GPU, 2048 on a CPU."
)
