"""The gate in a plain loop, in float16 on a GPU.

python docs/examples/plain.py --max_steps 50
"""

import torch
from fusedacl.engine import GradientGate
from texts import Classifier, batches, losses, parser_of_options

options = parser_of_options().parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = Classifier(options.model_name_or_path).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
gate = GradientGate(model.parameters(), weight=0.02)
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
for step, (batch, labels) in enumerate(batches(options)):
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        main, auxiliary = losses(model(**batch), labels.to(device))
    # An overflow of either loss makes the scaler skip this step and lower its scale.
    decision = gate.backward(scaler.scale(main), scaler.scale(auxiliary))
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    print(f"step {step}: loss {main:.4f}, {auxiliary:.4f}, angle {decision.angle.item():.1f}")
