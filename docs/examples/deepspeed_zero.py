"""The gate in a loop of DeepSpeed, of any ZeRO stage.

deepspeed --num_gpus 2 docs/examples/deepspeed_zero.py --max_steps 50 --zero_stage 2
"""

import deepspeed
import torch
from fusedacl.engine import ZeroGate
from texts import Classifier, batches, losses, parser_of_options

parser = parser_of_options()
parser.add_argument("--zero_stage", type=int, default=2)
options = parser.parse_args()
deepspeed.init_distributed()
rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = Classifier(options.model_name_or_path)
config = {
    "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": options.zero_stage},
    "bf16": {"enabled": torch.cuda.is_available()},
}
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=options.learning_rate),
    config=config,
)
gate = ZeroGate(engine, weight=0.02)
for step, (batch, labels) in enumerate(batches(options, rank, world_size)):
    batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
    main, auxiliary = losses(engine(**batch), labels.to(engine.device))
    gate.backward(main, auxiliary)
    decision = gate.step()
    if decision is not None and rank == 0:
        print(f"step {step}: loss {main:.4f}, {auxiliary:.4f}, angle {decision.angle.item():.1f}")
engine.destroy()
