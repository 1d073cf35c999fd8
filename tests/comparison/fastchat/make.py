"""How the files here were written: by FastChat 0.2.36's own code with a function for the judge. Run
once, with fschat on the path:

    pip install --no-deps fschat==0.2.36 && python make.py

`result-single.txt` and `result-pairwise.txt` are what its show_result.py prints of them.
"""

import contextlib
import io
import sys
import types
from pathlib import Path

# It is imported, and not used.
sys.modules.setdefault("anthropic", types.ModuleType("anthropic"))
from fastchat.llm_judge import common, show_result  # noqa: E402

HERE = Path(__file__).parent
MODELS = ("fpo", "dpo")
# What the judge says: of a single answer, and of two in the order in which it sees them.
GRADES = {"fpo": ["7", "9", "4", "8.5", "nothing", "6"], "dpo": ["7", "5", "6", "8", "3", "6"]}
FIRST = ["A", "B", "C", "A", "nothing", "A"]
SECOND = ["B", "A", "A", "A", "B", "B"]


def main() -> None:
    """Judge six questions of two turns, one turn after the other."""
    for name in ("gpt-4_single.jsonl", "gpt-4_pair.jsonl"):
        (HERE / name).unlink(missing_ok=True)
    for turn in (0, 1):
        for number in range(6):
            _judge(number, turn)
    for mode in ("single", "pairwise"):
        printed = io.StringIO()
        arguments = types.SimpleNamespace(
            input_file=str(HERE / f"gpt-4_{'single' if mode == 'single' else 'pair'}.jsonl"),
            bench_name="mt_bench",
            model_list=None,
            baseline_model=None,
        )
        with contextlib.redirect_stdout(printed):
            getattr(show_result, f"display_result_{mode}")(arguments)
        text = printed.getvalue().split("\n", 1)[1]
        (HERE / f"result-{mode}.txt").write_text(text)


def _judge(number: int, turn: int) -> None:
    question = {"question_id": 81 + number, "category": "writing", "turns": ["a", "b"]}
    answer = {"choices": [{"index": 0, "turns": ["one", "two"]}]}
    # The second turn's verdicts are the first's of another question.
    place = (number + 2 * turn) % 6
    for model in MODELS:
        common.chat_completion_openai = lambda *_, said=GRADES[model][place], **__: f"[[{said}]]"
        judge = common.Judge("gpt-4", _prompt("single", "[[rating]]", turn), multi_turn=turn == 1)
        match = common.MatchSingle(question, model, answer, judge, multi_turn=turn == 1)
        common.play_a_match_single(match, str(HERE / "gpt-4_single.jsonl"))
    said = iter([f"[[{FIRST[place]}]]", f"[[{SECOND[place]}]]"])
    common.chat_completion_openai = lambda *_, **__: next(said)
    judge = common.Judge("gpt-4", _prompt("pairwise", "[[A]]", turn), multi_turn=turn == 1)
    match = common.MatchPair(question, *MODELS, answer, answer, judge, multi_turn=turn == 1)
    common.play_a_match_pair(match, str(HERE / "gpt-4_pair.jsonl"))


def _prompt(kind: str, form: str, turn: int) -> dict[str, str]:
    names = {"single": ["question", "answer"], "pairwise": ["question", "answer_a", "answer_b"]}
    fields = names[kind]
    if turn:
        fields = [f"{name}_{i}" for name in fields for i in (1, 2)]
    template = " ".join(f"{{{name}}}" for name in fields)
    return {
        "name": kind, "type": kind, "system_prompt": "", "prompt_template": template,
        "output_format": form,
    }  # fmt: skip


if __name__ == "__main__":
    main()
