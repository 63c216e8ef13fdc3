"""Rank functions with a gate in loops of FSDP2 and DistributedDataParallel, and its oracle."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from fusedacl.engine import GateDecision, GradientGate
from fusedacl.kernels import acl_loss
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

NUM_STEPS, RATE, WEIGHT = 3, 0.5, 0.3
LABELS = 3


class Net(nn.Module):
    """Odd sizes, of which some ranks get nothing; a frozen weight; heads of one loss alone."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        self.classes, self.projection = nn.Linear(5, LABELS), nn.Linear(5, 5)
        self.second.weight.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Representations, logits, and the label embeddings that FSDP2 frees after this."""
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.projection(hidden), self.classes(hidden), self.classes.weight * 1.0


class Step(NamedTuple):
    angle: float
    kept: bool
    grad_norm: float
    gradients: list[Tensor]


def rows_of(rank: int, number: int) -> int:
    """Texts of a rank in micro-batch `number`: the last rank has fewer than the others."""
    return 4 if rank else 7 - number % 2


def batch(number: int, ranks: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Micro-batch `number` of these ranks, one after the other."""
    parts = []
    for rank in ranks:
        generator = torch.Generator().manual_seed(100 * number + rank)
        rows = rows_of(rank, number)
        x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        parts.append((x.to(dtype), torch.randint(0, LABELS, (rows,), generator=generator)))
    x, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return x, labels


def losses(
    model: nn.Module, x: Tensor, labels: Tensor, share: float, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Losses whose mean over the ranks is that of the whole batch.

    share: of a rank's texts among those of all ranks, times the number of ranks.
    """
    representations, logits, label_embeddings = model(x)
    main = functional.cross_entropy(logits.to(x.dtype), labels)
    return share * main, acl_loss(representations, labels, label_embeddings, process_group=group)


def by_hand(ranks: int, options: dict[str, Any]) -> list[Step]:
    """Plain steps on the batches of all ranks, in float64."""
    net = Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    accumulation, max_norm = options.get("accumulation", 1), options.get("max_norm")
    made = []
    for step in range(NUM_STEPS):
        sums = [torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64) for _ in range(2)]
        for micro in range(accumulation):
            x, labels = batch(step * accumulation + micro, range(ranks), torch.float64)
            for total, loss in zip(sums, losses(net, x, labels, 1.0, None), strict=True):
                found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
                parts = zip(trained, found, strict=True)
                flat = [torch.zeros_like(p) if g is None else g for p, g in parts]
                total += torch.cat([part.flatten() for part in flat]) / accumulation
        main, auxiliary = sums
        cosine = main.dot(auxiliary) / (main.norm() * auxiliary.norm())
        angle = math.degrees(math.acos(cosine))
        used = WEIGHT if angle <= options["max_angle"] else 0.0
        combined = (1 - used) * main + used * auxiliary
        norm = float(combined.norm())
        if max_norm is not None:
            combined *= min(1.0, max_norm / (norm + 1e-6))
        gradients = [
            part.view_as(p)
            for p, part in zip(trained, combined.split([p.numel() for p in trained]), strict=True)
        ]
        made.append(Step(angle, angle <= options["max_angle"], norm, gradients))
        for p, gradient in zip(trained, gradients, strict=True):
            p.data -= RATE * gradient
    return made


class Loop:
    """A model and a gate on some of the ranks; the others do the same beside them.

    Options: ddp (instead of FSDP2), hybrid (FSDP2 in each half of the ranks), layers (each sharded
    by itself), reshard, bf16, accumulation, late (micro-batches are reduced with the last one),
    late_all_reduce (between the halves only), max_norm, max_angle, reentrant (of activations that
    are computed again).
    """

    def __init__(self, rank: int, ranks: int, options: dict[str, Any]) -> None:
        world = torch.distributed.get_world_size()
        self.ranks, self.options = ranks, options
        self.rank = rank % ranks
        self.dtype = torch.float32 if options.get("bf16") else torch.float64
        shards = ranks // 2 if options.get("hybrid") else ranks
        mesh = init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("copy", "shard"))
        self.group = torch.distributed.group.WORLD if ranks == world else mesh.get_group("shard")
        net = Net(self.dtype)
        if "reentrant" in options:
            middle, reentrant = net.second.forward, options["reentrant"]
            net.second.forward = lambda x: checkpoint(middle, x, use_reentrant=reentrant)
        self.model: Any
        if options.get("ddp"):
            self.model = DistributedDataParallel(net, process_group=self.group)
        else:
            self.model = self._sharded(net, mesh if options.get("hybrid") else mesh["shard"])
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=RATE)
        self.gate = GradientGate(
            self.trained,
            weight=WEIGHT,
            max_angle=options["max_angle"],
            process_group=self.group if options.get("ddp") else None,
        )

    def _sharded(self, net: Net, mesh: DeviceMesh) -> nn.Module:
        policy = MixedPrecisionPolicy()
        if self.options.get("bf16"):
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        if self.options.get("layers", True):
            for layer in (net.first, net.second, net.projection):
                fully_shard(layer, reshard_after_forward=self.options["reshard"], **settings)
        fully_shard(net, **settings)
        return net

    def step(self, step: int) -> GateDecision:
        options = self.options
        accumulation = options.get("accumulation", 1)
        for micro in range(accumulation):
            last = micro == accumulation - 1
            number = step * accumulation + micro
            x, labels = batch(number, [self.rank], self.dtype)
            total = sum(rows_of(other, number) for other in range(self.ranks))
            share = self.ranks * len(x) / total
            if options.get("late"):
                self.model.set_requires_gradient_sync(last)
            if options.get("late_all_reduce"):
                self.model.set_requires_all_reduce(last)
            silence = self.model.no_sync() if options.get("ddp") else contextlib.nullcontext()
            with silence:
                main, auxiliary = losses(self.model, x, labels, share, self.group)
                self.gate.accumulate(main / accumulation, auxiliary / accumulation)
        return self.gate.combine(max_norm=options.get("max_norm"))

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def whole(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, zeros if there is none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    assert isinstance(gradient, DTensor) == isinstance(parameter, DTensor)
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def steps(rank: int, ranks: int, options: dict[str, Any]) -> list[Step]:
    """Steps of a loop on `ranks` of the ranks."""
    loop = Loop(rank, ranks, options)
    made = []
    for step in range(NUM_STEPS):
        found = loop.step(step)
        values = (found.angle.item(), bool(found.kept), found.grad_norm.item())
        made.append(Step(*values, [whole(p) for p in loop.trained]))
        loop.update()
    return made


class Collectives(TorchDispatchMode):
    """Counts, by name, what torch.distributed sends inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again as what DTensor makes of it
        if func.namespace == "c10d":
            self.counts[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def collectives(rank: int, options: dict[str, Any]) -> dict[str, int]:
    """Collectives of a step, without those of the loss, which has rows of its own."""
    loop = Loop(rank, torch.distributed.get_world_size(), options)
    loop.group = None
    loop.step(0)
    loop.update()
    with Collectives() as counter:
        loop.step(1)
    return dict(counter.counts)


def groups_on_two_meshes(rank: int) -> tuple[list[float], list[float]]:
    """Angles of three groups whose parameters lie in two ways, and of the plain model."""
    world = torch.distributed.get_world_size()
    group_of = {"first": 0, "second": 1, "classes": 2, "projection": 0, "unused": 1}
    made = []
    for shards in (True, False):
        net = Net()
        ranks = [rank] if shards else range(world)
        if shards:
            halves = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copy", "shard"))
            fully_shard(net.projection, mesh=halves)
            fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        groups = [group_of[name.split(".")[0]] for name in named]
        gate = GradientGate(named.values(), weight=WEIGHT, groups=groups)
        x, labels = batch(0, ranks, torch.float64)
        total = sum(rows_of(other, 0) for other in range(world))
        share = world * len(x) / total if shards else 1.0
        group = torch.distributed.group.WORLD if shards else None
        made.append(gate.backward(*losses(net, x, labels, share, group)).angle.tolist())
    return made[0], made[1]


def refusals(rank: int) -> list[str]:
    """Messages about sharded models of which the gate could not take two gradients."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    world = torch.distributed.group.WORLD

    def sharded_gate(**settings: Any) -> tuple[Net, GradientGate]:
        net = Net()
        fully_shard(net, mesh=mesh)
        return net, GradientGate([p for p in net.parameters() if p.requires_grad], **settings)

    def lossy(net: nn.Module) -> tuple[Tensor, Tensor]:
        return losses(net, *batch(0, [rank], torch.float64), 1.0, None)

    def a_part_is_not_sharded() -> None:
        net = Net()
        fully_shard(net.first, mesh=mesh)
        GradientGate([p for p in net.parameters() if p.requires_grad])

    def gathered_parameters() -> None:
        net = Net()
        fully_shard(net, mesh=mesh)
        made = lossy(net)
        GradientGate([p for p in net.parameters() if p.requires_grad]).accumulate(*made)

    def before_sharding() -> None:
        net = Net()
        gate = GradientGate([p for p in net.parameters() if p.requires_grad])
        fully_shard(net, mesh=mesh)
        gate.accumulate(*lossy(net))

    def averaged_twice() -> None:
        sharded_gate(process_group=world)

    def scope() -> None:
        net, gate = sharded_gate()
        gate.backward(*lossy(net), scope=list(net.first.parameters()))

    def not_reduced() -> None:
        net, gate = sharded_gate()
        net.set_requires_gradient_sync(False)
        gate.accumulate(*lossy(net))
        gate.combine()

    def unfrozen() -> None:
        net, gate = sharded_gate()
        net.second.weight.requires_grad_(True)
        gate.accumulate(*lossy(net))

    def flat_parameter(use_orig_params: bool) -> None:
        net = Net()
        net.second.weight.requires_grad_(True)
        model = FullyShardedDataParallel(
            net, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        GradientGate(model.parameters()).accumulate(*lossy(model))

    said = []
    for call in (
        a_part_is_not_sharded,
        gathered_parameters,
        before_sharding,
        averaged_twice,
        scope,
        not_reduced,
        unfrozen,
        lambda: flat_parameter(False),
        lambda: flat_parameter(True),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def skipped_by_a_scaler(rank: int, options: dict[str, Any]) -> list[tuple[bool, float, float]]:
    """Finite, the next scale and the largest change of a weight, after an overflow on one rank."""
    loop = Loop(rank, torch.distributed.get_world_size(), options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    made = []
    for step in range(3):
        before = torch.cat([local(p).flatten() for p in loop.trained])
        x, labels = batch(step, [loop.rank], loop.dtype)
        silence = loop.model.no_sync() if options.get("ddp") else contextlib.nullcontext()
        with silence:
            main, auxiliary = losses(loop.model, x, labels, 1.0, loop.group)
            # One of the losses overflows on one rank only.
            factor = torch.inf if step == 1 and rank == 2 else 1.0
            loop.gate.accumulate(scaler.scale(main), factor * scaler.scale(auxiliary))
        decision = loop.gate.combine()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        now = torch.cat([local(p).flatten() for p in loop.trained])
        moved = float((now - before).abs().max())
        made.append((bool(decision.finite), scaler.get_scale(), moved))
    return made


def local(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found
