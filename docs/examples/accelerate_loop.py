"""The gate and the monitor of angles in a loop of accelerate.

accelerate launch docs/examples/accelerate_loop.py --max_steps 50
"""

import argparse

import torch
from accelerate import Accelerator
from fusedacl.engine import AngleMonitor, GradientGate
from fusedacl.engine.data.quickstart import minilm_path, quickstart_splits
from fusedacl.kernels import ACLLoss
from transformers import AutoModel, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path", help="an encoder (default: MiniLM, if installed)")
parser.add_argument("--max_steps", type=int, default=50)
options = parser.parse_args()
name = options.model_name_or_path or str(minilm_path())

accelerator = Accelerator()
group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)
classifier = torch.nn.Linear(encoder.config.hidden_size, 3)
optimizer = torch.optim.AdamW([*encoder.parameters(), *classifier.parameters()], lr=5e-5)


def collate(rows):
    pairs = [(row["sentence1"], row["sentence2"]) for row in rows]
    encoded = tokenizer(pairs, padding=True, return_tensors="pt")
    return dict(encoded), torch.tensor([row["label"] for row in rows])


loader = torch.utils.data.DataLoader(
    quickstart_splits()["train"], batch_size=16, shuffle=True, collate_fn=collate, drop_last=True
)
encoder, classifier, optimizer, loader = accelerator.prepare(encoder, classifier, optimizer, loader)
parameters = [*encoder.parameters(), *classifier.parameters()]
gate = GradientGate(parameters, weight=0.02, process_group=group)
monitor = AngleMonitor(classifier.parameters(), every=10, process_group=group)
acl = ACLLoss(temperature=0.5)
for step, (batch, labels) in zip(range(options.max_steps), loader, strict=False):
    # The gate averages both gradients itself, once per optimizer step.
    with accelerator.no_sync(encoder), accelerator.no_sync(classifier):
        embeddings = encoder(**batch).last_hidden_state[:, 0]
        weight = accelerator.unwrap_model(classifier).weight
        main = torch.nn.functional.cross_entropy(classifier(embeddings), labels)
        auxiliary = acl(embeddings, labels, weight)
        angle = monitor.measure(main, auxiliary)  # of the classifier alone: almost free
        gate.accumulate(main / 2, auxiliary / 2)
    if angle is not None:
        accelerator.print(f"batch {step}: {angle.item():.1f} degrees at the classifier")
    if step % 2 == 1:
        decision = gate.combine(max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step // 2}: {main.item():.3f}, kept {decision.kept.item()}")
