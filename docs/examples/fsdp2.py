"""The gate under FSDP2, whose parameters it recognises, computed in bfloat16.

torchrun --nproc_per_node 2 docs/examples/fsdp2.py --max_steps 50
"""

import torch
from fusedacl.engine import GradientGate
from texts import Classifier, batches, losses, parser_of_options
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

options = parser_of_options().parse_args()
torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = torch.distributed.init_device_mesh(device, (world_size,))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
model = Classifier(options.model_name_or_path).to(device)
for layer in model.encoder.encoder.layer:
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
gate = GradientGate(model.parameters(), weight=0.02)
for step, (batch, labels) in enumerate(batches(options, rank, world_size)):
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    main, auxiliary = losses(model(**batch), labels.to(device))
    gate.accumulate(main, auxiliary)
    decision = gate.combine(max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss {main:.4f}, {auxiliary:.4f}, angle {decision.angle.item():.1f}")
torch.distributed.destroy_process_group()
