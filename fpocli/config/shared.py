"""Flags and defaults that several commands have in common."""

from typer import Option

DEFAULT_DATA = "HuggingFaceH4/ultrafeedback_binarized"

# The value of fpo train --feature-weights that names no file.
LOGITS = "logits"

# What fpo train --where may compare: the reference's margin, in nats per token, and summed
# log-probabilities; lengths in tokens; the row in the source, and which source of a mixture.
PAIR_COLUMNS = (
    "margin", "chosen_logp", "rejected_logp",
    "prompt_tokens", "chosen_tokens", "rejected_tokens", "row", "source",
)  # fmt: skip

# The judges whose questions are known by name -> repository on the hub, its type, and the file.
# Arena-Hard's first version, of 500 questions, is the paper's.
JUDGES = {
    "alpaca_eval": ("tatsu-lab/alpaca_eval", "dataset", "alpaca_eval.json"),
    "arena_hard": (
        "lmarena-ai/arena-hard-auto",
        "dataset",
        "data/arena-hard-v0.1/question.jsonl",
    ),
    "mt_bench": ("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl"),
}

# Where --track can send what is measured.
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

DEVICE = Option(help="cpu, cuda, cuda:1, ... Default: cuda if available.")
JSON = Option("--json", help="Print JSON.")
TRACK = Option(
    metavar="TRACKER",
    help=f"Also send what is measured to {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}, by its own "
    "client, whose environment variables hold. Repeatable.",
)
TRUST_REMOTE_CODE = Option(
    "--trust-remote-code",
    help="Run Python code that comes with the models. Not allowed in a YAML file.",
)


PACKED_LENGTH_HELP = (
    "Tokens of one packed sequence, in which several pairs are scored at once. More is faster up "
    "to a point and takes more memory. Default: 8192 on a GPU, 2048 on a CPU."
)
