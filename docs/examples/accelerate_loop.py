"""The gate in a loop of accelerate, on one process or several.

accelerate launch --num_processes 2 docs/examples/accelerate_loop.py --max_steps 50
"""

import torch
from accelerate import Accelerator
from fusedacl.engine import GradientGate
from texts import Classifier, batches, losses, parser_of_options

options = parser_of_options().parse_args()
accelerator = Accelerator()
model = Classifier(options.model_name_or_path)
optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
model, optimizer = accelerator.prepare(model, optimizer)
several = accelerator.num_processes > 1
gate = GradientGate(
    model.parameters(),
    weight=0.02,
    process_group=torch.distributed.group.WORLD if several else None,
)
for step, (batch, labels) in enumerate(
    batches(options, accelerator.process_index, accelerator.num_processes)
):
    batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
    # The gate averages both gradients itself; this replaces accelerator.backward(loss).
    with accelerator.no_sync(model):
        main, auxiliary = losses(model(**batch), labels.to(accelerator.device))
        gate.accumulate(main, auxiliary)
    decision = gate.combine(max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(
        f"step {step}: loss {main:.4f}, {auxiliary:.4f}, angle {decision.angle.item():.1f}"
    )
accelerator.end_training()
