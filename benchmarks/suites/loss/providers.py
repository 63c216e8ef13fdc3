"""Providers of the contrastive loss: each implementation of ours, and the alternatives.

The alternatives compute the loss of rows [M, d] with labels [M]. For `acl_loss` they get samples
and label embeddings concatenated; for several exits they are called in a loop.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....kernels import acl_cl_loss, acl_loss, supcon_loss
from ....kernels.contrastive.batch import PAIR_MEMORY
from ....kernels.contrastive.dispatch import Workload, choose, obstacle, triton_file
from .. import baselines
from ..suite import Call, Provider, missing
from .exact import ALL, OTHERS, OTHERS_ALL_ROWS, SIGMOIDS

if TYPE_CHECKING:
    from .case import LossCase, LossInputs

TEMPERATURE = 0.5
OURS = "fusedacl"
# Memory beyond the inputs, in bytes per pair of rows in float32: measured for forward + backward of
# 1024 to 4096 rows on the CPU, rounded up.
BYTES_PER_PAIR = {"reference": 29, "dense": 29, "compiled": 21, "supcontrast": 30, "metric": 46}
# Rows per block of the checkpointed loss.
BLOCK_ROWS = 1024

# Arguments: rows [M, d], labels [M], number of classes.
RowLoss = Callable[[Tensor, Tensor, int], Tensor]
Obstacle = Callable[["LossCase", torch.device], str | None]


def providers(case: "LossCase", device: torch.device) -> list[Provider]:
    """All providers: ours with impl="auto", each implementation of ours, then the others."""
    formula, denominator = (OTHERS, "others") if case.loss == "supcon" else (ALL, "all")

    def dense(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        return baselines.dense_supcon(rows, labels, TEMPERATURE, denominator)

    def autocast(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        with torch.autocast(rows.device.type, dtype=rows.dtype):
            return dense(rows, labels, num_classes)

    def checkpointed(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        return baselines.checkpointed_supcon(rows, labels, TEMPERATURE, denominator, BLOCK_ROWS)

    def supcontrast(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        z = torch.nn.functional.normalize(rows, dim=1)
        return baselines.supcontrast(z[:, None], labels, TEMPERATURE)

    def metric_learning() -> RowLoss:
        from pytorch_metric_learning.losses import SupConLoss

        loss = SupConLoss(temperature=TEMPERATURE)
        return lambda rows, labels, num_classes: loss(rows, labels)

    return [
        *(_ours(case, device, formula, impl) for impl in ("auto", "tiled", "triton", "reference")),
        _by_rows("dense", lambda: dense, formula, _pairs_of("dense")),
        _by_rows(
            "dense torch.compile", lambda: dense, formula, _pairs_of("compiled"),
            _compiler_obstacle, compiled=True,
        ),
        _by_rows(
            "dense autocast", lambda: autocast, formula, _pairs_of("dense"), _autocast_obstacle
        ),
        _by_rows("checkpointed row blocks", lambda: checkpointed, formula, _blocks),
        _by_rows("SupContrast", lambda: supcontrast, OTHERS_ALL_ROWS, _pairs_of("supcontrast")),
        _by_rows(
            "pytorch-metric-learning", metric_learning, OTHERS, _pairs_of("metric"),
            lambda case, device: missing("pytorch_metric_learning", "pytorch-metric-learning"),
        ),
        _by_rows(
            "inf-cl", lambda: _by_log_sum_exp(baselines.flash_log_sum_exp()), OTHERS, _linear,
            partial(_on_gpu, "inf-cl"),
        ),
        _by_rows(
            "cut-cross-entropy", lambda: _by_log_sum_exp(baselines.cut_log_sum_exp()), OTHERS,
            _linear, _cut_obstacle,
        ),
        _by_rows(
            "memeff", lambda: _by_mean(baselines.memeff_mean_log_sum_exp()), ALL, _linear,
            partial(_on_gpu, "memeff"),
        ),
        _by_rows(
            "siglip-kernel", lambda: _sigmoids(baselines.siglip_plus()), SIGMOIDS, _linear,
            partial(_on_gpu, "siglip-kernel"),
        ),
    ]  # fmt: skip


def _linear(case: "LossCase") -> int:
    """Bytes of a few float32 copies of rows, gradients and class sums, and of one tile."""
    rows = case.exits * (8 * case.num_rows + 4 * case.classes) * case.width * 4
    return rows + 32 * 2**20


def _pairs_of(kind: str) -> Callable[["LossCase"], int]:
    def extra_bytes(case: "LossCase") -> int:
        pairs = case.exits * case.num_rows**2
        return pairs * BYTES_PER_PAIR[kind] * case.torch_dtype.itemsize // 4 + _linear(case)

    return extra_bytes


def _blocks(case: "LossCase") -> int:
    of_block = min(BLOCK_ROWS, case.num_rows) * case.num_rows
    return of_block * BYTES_PER_PAIR["dense"] + _linear(case)


def _ours(case: "LossCase", device: torch.device, formula: str, impl: str) -> Provider:
    workload = Workload(device, case.torch_dtype, TEMPERATURE, case.num_rows, case.width)

    def make(case: "LossCase", device: torch.device) -> Call:
        losses: dict[str, Callable[..., Tensor]] = {
            "supcon": partial(supcon_loss, denominator="others"), "acl": acl_loss,
            "acl_cl": acl_cl_loss,
        }  # fmt: skip
        loss = partial(losses[case.loss], temperature=TEMPERATURE, impl=impl)
        return partial(forward_backward, loss)

    def why_not(case: "LossCase", device: torch.device) -> str | None:
        file = triton_file(workload) if impl == "triton" else impl
        if impl != "auto" and choose("auto", workload) == file:
            return f"same as {OURS}, which chooses it here"
        return None if impl == "auto" else obstacle(file, workload)

    name = OURS if impl == "auto" else f"{OURS} {impl}"

    def extra_bytes(case: "LossCase") -> int:
        predicted = _pairs_of("reference") if impl == "reference" else _linear
        return predicted(case) + (PAIR_MEMORY if device.type == "cpu" else 0)

    return Provider(name, make, formula, extra_bytes, why_not, is_ours=True)


def forward_backward(loss: Callable[..., Tensor], inputs: "LossInputs") -> tuple[Tensor, ...]:
    """The losses, and the gradients of samples and label embeddings."""
    wanted = inputs.leaves
    value = loss(inputs.embeddings, inputs.labels, *wanted[1:], *inputs.teachers)
    upstream = torch.full_like(value, inputs.upstream)
    return value.detach(), *torch.autograd.grad(value, wanted, upstream)


def over_exits(loss: RowLoss, *arguments: Tensor) -> Tensor:
    """Apply a loss of rows to each exit.

    Arguments: samples [(E,) N, d], labels [N] and, for ACL, label embeddings [(E,) K, d]; for
    ACL-CL, also the teacher's samples [N, d] and label embeddings [K, d].
    """
    embeddings, labels, *more = arguments
    if not more:
        return loss(embeddings, labels, int(labels.shape[0]))
    label_embeddings, *teachers = more
    num_classes = label_embeddings.shape[-2]
    row_labels = torch.cat([labels, torch.arange(num_classes, device=labels.device)])
    row_labels = row_labels.repeat(2 if teachers else 1)
    if embeddings.dim() == 2:
        return loss(torch.cat([embeddings, label_embeddings, *teachers]), row_labels, num_classes)
    by_exit = zip(embeddings, label_embeddings, strict=True)
    return torch.stack(
        [loss(torch.cat([*rows, *teachers]), row_labels, num_classes) for rows in by_exit]
    )


def _by_rows(
    name: str,
    make_loss: Callable[[], RowLoss],
    formula: str,
    extra_bytes: Callable[["LossCase"], int],
    why_not: Obstacle = lambda case, device: None,
    compiled: bool = False,
) -> Provider:
    """A provider whose loss of rows is made only if it runs, because that imports its package."""

    def make(case: "LossCase", device: torch.device) -> Call:
        whole: Callable[..., Tensor] = partial(over_exits, make_loss())
        if compiled:
            # Dynamo limits how often one function is compiled again for other shapes.
            torch._dynamo.reset()
            whole = torch.compile(whole, dynamic=False)
        return partial(forward_backward, whole)

    return Provider(name, make, formula, extra_bytes, why_not)


def _by_log_sum_exp(log_sum_exp: Callable[[Tensor], Tensor]) -> RowLoss:
    def loss(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        return baselines.supcon_by_log_sum_exp(log_sum_exp, rows, labels, num_classes, TEMPERATURE)

    return loss


def _by_mean(mean_log_sum_exp: Callable[[Tensor, float], Tensor]) -> RowLoss:
    def loss(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        return baselines.supcon_by_mean_log_sum_exp(
            mean_log_sum_exp, rows, labels, num_classes, TEMPERATURE
        )

    return loss


def _sigmoids(siglip: Callable[[Tensor, Tensor, int, float], Tensor]) -> RowLoss:
    return lambda rows, labels, num_classes: siglip(rows, labels, num_classes, TEMPERATURE)


def _on_gpu(name: str, case: "LossCase", device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{name} runs on NVIDIA GPUs only: --device cuda"
    return missing(name.replace("-", "_"), name)


def _cut_obstacle(case: "LossCase", device: torch.device) -> str | None:
    reason = _on_gpu("cut-cross-entropy", case, device)
    if reason is None:
        from cut_cross_entropy import linear_cross_entropy

        if "return_lse" not in inspect.signature(linear_cross_entropy).parameters:
            reason = (
                "this cut-cross-entropy has no return_lse. Run: "
                "pip install git+https://github.com/apple/ml-cross-entropy"
            )
    return reason


def _autocast_obstacle(case: "LossCase", device: torch.device) -> str | None:
    if case.torch_dtype == torch.float32:
        return "float32 has nothing to cast: --dtypes float16 or bfloat16"
    return None


def _compiler_obstacle(case: "LossCase", device: torch.device) -> str | None:
    """A message if torch.compile cannot run: it needs a C++ compiler, or Triton on a GPU."""
    if device.type == "cuda":
        return missing("triton", "triton")
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        return f"torch.compile needs a C++ compiler (install g++ or clang): {error}"
    return None
