"""transformers' Trainer with ACL-Grad, on any classifier of transformers.

python docs/examples/trainer.py --output_dir out --max_steps 50 --objective acl
torchrun --nproc_per_node 2 docs/examples/trainer.py --output_dir out --max_steps 50
"""

from datasets import Dataset
from fusedacl.engine import ACLTrainer, ACLTrainingArguments
from fusedacl.engine.data.quickstart import minilm_path, quickstart_splits
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

parser = HfArgumentParser(ACLTrainingArguments)
parser.add_argument("--model_name_or_path", help="an encoder (default: MiniLM, if installed)")
arguments, given = parser.parse_args_into_dataclasses()
name = given.model_name_or_path or str(minilm_path())
tokenizer = AutoTokenizer.from_pretrained(name)
splits = {
    split: Dataset.from_list(rows).map(
        lambda batch: tokenizer(batch["sentence1"], batch["sentence2"], truncation=True),
        batched=True,
    )
    for split, rows in quickstart_splits().items()
}
trainer = ACLTrainer(
    # Or MultiExitForSequenceClassification, with --strategy joint or second_stage.
    AutoModelForSequenceClassification.from_pretrained(name, num_labels=3),
    arguments,
    train_dataset=splits["train"],
    eval_dataset=splits["validation"],
    processing_class=tokenizer,
)
trainer.train()
print(trainer.evaluate())
