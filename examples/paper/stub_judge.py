"""Judges answers without a judge: the longer one wins. It shows how verdicts come back in.

    python examples/paper/stub_judge.py demo/paper-small/judge/alpaca_eval.sh

Runs AlpacaEval's own code for every alpaca_eval command of the script that `fpo compare` wrote,
with a function in the place of GPT-4, and so writes the files that GPT-4's verdicts would come in.
The win rates say nothing about the models. Needs alpaca-eval.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import alpaca_eval
from alpaca_eval.annotators import PairwiseAnnotator, base

JUDGE = Path(__file__).with_name("stub_judge")


def longer(prompts: list[str], **_: Any) -> dict[str, list]:
    """The verdict on each prompt, as a model would write it."""
    texts = []
    for prompt in prompts:
        one, other = re.findall(r"<answer>\n(.*?)\n</answer>", prompt, re.DOTALL)
        texts.append("Output (a)" if len(one) >= len(other) else "Output (b)")
    nothing = [0.0] * len(texts)
    return {"completions": texts, "price_per_example": nothing, "time_per_example": nothing}


def main() -> None:
    """Judge every pair of answer files that the script names."""
    base.get_fn_completions = lambda name: longer
    for line in Path(sys.argv[1]).read_text().splitlines():
        if not line.startswith("alpaca_eval "):
            continue
        words = shlex.split(line)[1:]
        named = dict(zip(words[::2], words[1::2], strict=True))
        alpaca_eval.evaluate(
            model_outputs=named["--model_outputs"],
            reference_outputs=named["--reference_outputs"],
            annotators_config=str(JUDGE.resolve()),
            Annotator=PairwiseAnnotator,
            output_path=named["--output_path"],
            precomputed_leaderboard=None,
            is_cache_leaderboard=False,
            is_return_instead_of_print=True,
            caching_path=None,
            # At equal lengths a judge of lengths has nothing to say.
            fn_metric="get_winrate",
            sort_by="win_rate",
        )


if __name__ == "__main__":
    main()
