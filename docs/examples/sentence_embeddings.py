"""Sentence embeddings by class, with sentence-transformers' trainer.

python docs/examples/sentence_embeddings.py --output_dir out --max_steps 50
"""

from datasets import Dataset
from fusedacl.engine import SentenceSupConLoss
from fusedacl.engine.data.quickstart import minilm_path, quickstart_splits
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import HfArgumentParser

parser = HfArgumentParser(SentenceTransformerTrainingArguments)
parser.add_argument("--model_name_or_path", help="an encoder (default: MiniLM, if installed)")
parser.set_defaults(batch_sampler="group_by_label")  # gives each text a positive in its batch
arguments, given = parser.parse_args_into_dataclasses()
model = SentenceTransformer(given.model_name_or_path or str(minilm_path()))
texts = Dataset.from_list(
    [
        {"text": f"{row['sentence1']} {row['sentence2']}", "label": row["label"]}
        for row in quickstart_splits()["train"]
    ]
)
trainer = SentenceTransformerTrainer(
    model=model, args=arguments, train_dataset=texts, loss=SentenceSupConLoss(model)
)
trainer.train()
