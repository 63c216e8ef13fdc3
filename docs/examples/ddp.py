"""The gate under DistributedDataParallel, with gradients accumulated over two batches.

torchrun --nproc_per_node 2 docs/examples/ddp.py --max_steps 50
"""

import torch
from fusedacl.engine import GradientGate
from texts import Classifier, batches, losses, parser_of_options
from torch.nn.parallel import DistributedDataParallel

options = parser_of_options().parse_args()
torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
device = "cuda" if torch.cuda.is_available() else "cpu"
model = DistributedDataParallel(Classifier(options.model_name_or_path).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
gate = GradientGate(model.parameters(), weight=0.02, process_group=torch.distributed.group.WORLD)
for step, (batch, labels) in enumerate(batches(options, rank, world_size)):
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    # The gate averages both gradients itself, once per optimizer step.
    with model.no_sync():
        main, auxiliary = losses(model(**batch), labels.to(device))
        gate.accumulate(main / 2, auxiliary / 2)
    if step % 2 == 0:
        continue
    decision = gate.combine(max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss {main:.4f}, {auxiliary:.4f}, angle {decision.angle.item():.1f}")
torch.distributed.destroy_process_group()
