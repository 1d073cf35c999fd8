"""The paper's first stage, by TRL: a base model and conversations -> a model to cache.

    python examples/paper/sft.py --model google/gemma-2-2b --output_dir sft
    torchrun --nproc-per-node 4 examples/paper/sft.py --config sft.yaml

Takes all settings of TRL's SFTConfig. The conversations are UltraChat-200k or a local JSON, JSONL
or Parquet file with a column `messages`; the loss is taken over every turn of the assistant. The
tokeniser is saved with the template `halos`, by which `fpo cache` then formats the pairs. `fpo
compare` runs this as the first step of a grid with a section `sft`. Needs trl: `pip install
".[sft]"`.

The defaults are the paper's (Table 5, section 4): one epoch, Adam, 150 steps of warm-up, then a
constant learning rate of 5e-7; 32 conversations a step on four GPUs, 8 on one. The authors' own
command has a learning rate of 5e-6 (COMMANDS.md of FeatureAlignment).
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer, TrlParser

from fpocli.data.chat_templates import CHAT_TEMPLATES
from fpocli.system.model_folder import SHORT_NAMES

HALOS = CHAT_TEMPLATES["halos"]
_ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class SftData:
    """What is trained on what."""

    model: str = field(metadata={"help": "Base model: a hub id or a local folder."})
    data: str = field(
        default=_ULTRACHAT,
        metadata={"help": "Hub id, or a JSON, JSONL or Parquet file with a column `messages`."},
    )
    split: str | None = field(
        default=None, metadata={"help": "Default: train_sft for UltraChat, else train."}
    )
    limit: int | None = field(default=None, metadata={"help": "Read only this many rows."})


@dataclass
class Settings(SFTConfig):
    """TRL's settings, with other defaults."""

    assistant_only_loss: bool = True
    max_length: int | None = 2048
    learning_rate: float = 5e-7
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 150
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 4
    save_steps: float = 500
    save_total_limit: int | None = 1
    report_to: str = "none"


def main() -> None:
    """Train, and save the model in transformers' format."""
    data, settings = TrlParser((SftData, Settings)).parse_args_and_config()
    model = SHORT_NAMES.get(data.model, data.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = scored_halos()
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=conversations(data),
        processing_class=tokenizer,
    )
    # The same command resumes.
    folder = Path(str(settings.output_dir))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    tokenizer.chat_template = HALOS
    trainer.save_model(settings.output_dir)


def scored_halos() -> str:
    """The template `halos` with TRL's marks around what is scored: every answer and its end."""
    answer = "message['content'] }}{{ eos_token if message['role'] == 'assistant' }}"
    start = "{{ '<|' + message['role'] + '|>\n' + " + answer
    assert start in HALOS
    return HALOS.replace(
        start,
        "{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}",
    )


def conversations(data: SftData) -> Dataset:
    """The rows, with the column `messages` alone."""
    split = data.split or ("train_sft" if data.data == _ULTRACHAT else "train")
    path = Path(data.data)
    if path.is_file():
        found = load_dataset(_BUILDERS[path.suffix], data_files=data.data, split="train")
    else:
        found = load_dataset(data.data, split=split)
    found = found.select(range(min(data.limit or len(found), len(found))))
    return found.select_columns(["messages"])


if __name__ == "__main__":
    main()
