"""Alternatives to our losses and gate, written the way their users write them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def dense_supcon(
    embeddings: Tensor, labels: Tensor, temperature: float = 0.5, denominator: str = "others"
) -> Tensor:
    """The dense formula in eager PyTorch, mean over the anchors that have a positive.

    Follows the steps of the loss published with Khosla et al. 2020 (positive mask, maximum
    subtracted, masked exponentials, mean log probability of the positives) with one view per
    sample, without its loop over views.
    """
    z = torch.nn.functional.normalize(embeddings, dim=1)
    similarity = torch.mm(z, z.t()) / temperature
    similarity = similarity - similarity.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(similarity).fill_diagonal_(0)
    positive = torch.eq(labels[:, None], labels[None, :]).to(similarity.dtype) * others
    exponentials = torch.exp(similarity)
    if denominator == "others":
        exponentials = exponentials * others
    log_probability = similarity - torch.log(exponentials.sum(1, keepdim=True))
    num_positives = positive.sum(1)
    mean_log_probability = (positive * log_probability).sum(1) / num_positives.clamp(min=1)
    # A 16-bit sum over many rows overflows.
    dtype = torch.promote_types(mean_log_probability.dtype, torch.float32)
    return -mean_log_probability.sum(dtype=dtype) / (num_positives > 0).sum()


def supcontrast(features: Tensor, labels: Tensor, temperature: float = 0.5) -> Tensor:
    """The loss of SupContrast (Khosla et al. 2020) for normalised features [N, views, d].

    Follows the published code: every view is contrasted with every view, masks are matrices, and
    the mean also counts the anchors without a positive, as 0.
    """
    num_samples, num_views = features.shape[:2]
    contrast = torch.cat(torch.unbind(features, dim=1), dim=0)
    mask = torch.eq(labels.view(-1, 1), labels.view(-1, 1).T).float().to(features.device)
    logits = torch.div(torch.matmul(contrast, contrast.T), temperature)
    logits = logits - torch.max(logits, dim=1, keepdim=True)[0].detach()
    mask = mask.repeat(num_views, num_views)
    itself = torch.arange(num_samples * num_views, device=features.device).view(-1, 1)
    logits_mask = torch.scatter(torch.ones_like(mask), 1, itself, 0)
    mask = mask * logits_mask
    log_probability = logits - torch.log((torch.exp(logits) * logits_mask).sum(1, keepdim=True))
    num_positives = mask.sum(1)
    num_positives = torch.where(num_positives < 1e-6, 1, num_positives)
    mean_log_probability = (mask * log_probability).sum(1) / num_positives
    return -mean_log_probability.view(num_views, num_samples).mean()


def checkpointed_supcon(
    embeddings: Tensor, labels: Tensor, temperature: float, denominator: str, block_rows: int
) -> Tensor:
    """The dense formula for one block of anchors after another, recomputed in the backward pass.

    The usual workaround when M x M does not fit: torch.utils.checkpoint around a block of rows.
    """
    z = torch.nn.functional.normalize(embeddings, dim=1)
    everything = torch.arange(len(z), device=z.device)

    def block_loss(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        similarity = torch.mm(z[rows], z.t()).float() / temperature
        itself = rows[:, None] == everything
        positive = (labels[rows, None] == labels) & ~itself
        kept = similarity if denominator == "all" else similarity.masked_fill(itself, -torch.inf)
        num_positives = positive.sum(1)
        positive_mean = (similarity * positive).sum(1) / num_positives.clamp(min=1)
        is_anchor = num_positives > 0
        return ((kept.logsumexp(1) - positive_mean) * is_anchor).sum(), is_anchor.sum()

    blocks = [
        checkpoint(block_loss, z, rows, use_reentrant=False)
        for rows in everything.split(block_rows)
    ]
    losses, counts = zip(*blocks, strict=True)
    return torch.stack(losses).sum() / torch.stack(counts).sum()


def dense_acl(embeddings: Tensor, labels: Tensor, label_embeddings: Tensor) -> Tensor:
    """`dense_supcon` of samples and label embeddings, concatenated, over all rows (eq. 1)."""
    label_ids = torch.arange(label_embeddings.shape[0], device=labels.device)
    rows = torch.cat([embeddings, label_embeddings])
    return dense_supcon(rows, torch.cat([labels, label_ids]), denominator="all")


def flash_log_sum_exp() -> Callable[[Tensor], Tensor]:
    """log sum_k exp(y_i . y_k) [M] by inf_cl's public loss, from which its numerator is removed."""
    from inf_cl import cal_flash_loss

    def log_sum_exp(y: Tensor) -> Tensor:
        # inf_cl takes the width in heads of at most 256.
        negative_log = cal_flash_loss(y, y, head_dim=min(y.shape[1], 256))
        return negative_log + y.float().square().sum(1)

    return log_sum_exp


def cut_log_sum_exp() -> Callable[[Tensor], Tensor]:
    """log sum_k exp(y_i . y_k) [M] by cut_cross_entropy (a version with `return_lse`).

    The gradient filter is off: a softmax over M rows is small everywhere, so the filter would drop
    the whole gradient.
    """
    from cut_cross_entropy import linear_cross_entropy

    options = {
        "reduction": "none", "return_lse": True, "filter_eps": None, "accum_e_fp32": True,
        "accum_c_fp32": True,
    }  # fmt: skip

    def log_sum_exp(y: Tensor) -> Tensor:
        targets = torch.arange(y.shape[0], device=y.device)
        _, found = linear_cross_entropy(y, y, targets, **options)
        return found

    return log_sum_exp


def memeff_mean_log_sum_exp() -> Callable[[Tensor, float], Tensor]:
    """mean_i of log sum_k exp(z_i . z_k / temperature) by memeff's two-sided CLIP loss.

    Unit rows stand on both sides, whose losses are then equal; |z_i|^2 / temperature is added back.
    """
    from memeff import MemoryEfficientCLIPLoss

    def mean_log_sum_exp(z: Tensor, temperature: float) -> Tensor:
        loss = MemoryEfficientCLIPLoss(temperature, normalized_inputs=True, stable=False)
        return loss(z, z) + z.float().square().sum(1).mean() / temperature

    return mean_log_sum_exp


def supcon_by_mean_log_sum_exp(
    mean_log_sum_exp: Callable[[Tensor, float], Tensor],
    embeddings: Tensor,
    labels: Tensor,
    num_classes: int,
    temperature: float = 0.5,
) -> Tensor:
    """The loss (denominator "all", mean) from a loss that has a mean over all rows only.

    Every row must have a positive. Positives come from class sums.
    """
    z = torch.nn.functional.normalize(embeddings.float(), dim=1)
    sums = z.new_zeros(num_classes, z.shape[1]).index_add(0, labels, z)
    num_members = z.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(z[:, 0]))
    positives = ((sums[labels] - z) * z).sum(1) / (num_members[labels] - 1)
    everything = mean_log_sum_exp(z.to(embeddings.dtype), temperature)
    return everything.float() - positives.mean() / temperature


def siglip_plus() -> Callable[[Tensor, Tensor, int, float], Tensor]:
    """siglip-kernel's sigmoid loss of rows with themselves; rows of one class are positives.

    With unit rows, s_ij = z_i . z_j / temperature and n_i the size of i's class: the mean over all
    pairs of log(1 + exp(s_ij)) or, for a positive pair, of log(1 + exp(-s_ij)) / n_i.
    """
    from siglip_kernel import fused_siglip_plus_loss

    def loss(rows: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
        z = torch.nn.functional.normalize(rows, dim=1)
        scale = torch.full((), -math.log(temperature), device=rows.device)
        return fused_siglip_plus_loss(
            z, z, scale, torch.zeros_like(scale), labels, labels, num_groups=num_classes
        )

    return loss


def supcon_by_log_sum_exp(
    log_sum_exp: Callable[[Tensor], Tensor],
    embeddings: Tensor,
    labels: Tensor,
    num_classes: int,
    temperature: float = 0.5,
) -> Tensor:
    """The loss (denominator "others", mean) from a kernel that sums exponentials over all rows.

    Positives come from class sums, so that nothing of size M x M is needed.
    """
    y = torch.nn.functional.normalize(embeddings.float(), dim=1) / temperature**0.5
    rounded = y.to(embeddings.dtype)
    everything = log_sum_exp(rounded).float()
    itself = rounded.float().square().sum(1)
    log_denominator = everything + torch.log1p(-torch.exp(itself - everything))
    sums = y.new_zeros(num_classes, y.shape[1]).index_add(0, labels, y)
    num_members = y.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(y[:, 0]))
    num_positives = num_members[labels] - 1
    positive_mean = ((sums[labels] - y) * y).sum(1) / num_positives.clamp(min=1)
    is_anchor = num_positives > 0
    return ((log_denominator - positive_mean) * is_anchor).sum() / is_anchor.sum()


def looped_dot_norm(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(a . b, |a|^2, |b|^2) by a loop over parameters with three dot products each."""
    sums = a[0].new_zeros(3, dtype=torch.promote_types(a[0].dtype, torch.float32))
    for x, y in zip(a, b, strict=True):
        x, y = _widened(x.reshape(-1)), _widened(y.reshape(-1))
        sums += torch.stack([torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)])
    return sums


def concatenated_dot_norm(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(a . b, |a|^2, |b|^2) the usual way: flatten both lists, one dot, two norms."""
    flat_a = _widened(torch.cat([tensor.reshape(-1) for tensor in a]))
    flat_b = _widened(torch.cat([tensor.reshape(-1) for tensor in b]))
    return torch.stack([torch.dot(flat_a, flat_b), flat_a.norm() ** 2, flat_b.norm() ** 2])


def foreach_dot_norm(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(a . b, |a|^2, |b|^2) with PyTorch's multi-tensor norms and a loop of dot products."""
    norms = [
        torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32)).square().sum()
        for tensors in (a, b)
    ]
    return torch.stack([_sum_of_dots(a, b), *norms])


def _sum_of_dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    pairs = zip(a, b, strict=True)
    dots = (torch.dot(_widened(x.reshape(-1)), _widened(y.reshape(-1))) for x, y in pairs)
    return torch.as_tensor(sum(dots))


def _widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: squares of gradients overflow float16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unscale_and_clip_(
    gradients: Sequence[Tensor], inverse_scale: Tensor, found_inf: Tensor, max_norm: float
) -> None:
    """GradScaler's unscale_ and clip_grad_norm_ (foreach), which every float16 step needs."""
    # GradScaler calls this once for each dtype; here all gradients have the same one.
    torch._amp_foreach_non_finite_check_and_unscale_(list(gradients), found_inf, inverse_scale)
    torch._foreach_mul_(list(gradients), _clip_factor(gradients, max_norm))


def _clip_factor(gradients: Sequence[Tensor], max_norm: float) -> Tensor:
    norms = torch._foreach_norm(list(gradients), 2)
    total = torch.linalg.vector_norm(torch.stack(norms), 2)
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)


def foreach_gate_(
    a: Sequence[Tensor], b: Sequence[Tensor], weight: float, one: Tensor, max_norm: float
) -> None:
    """a <- the combination, unscaled and clipped, with multi-tensor operations and no angle."""
    torch._foreach_lerp_(list(a), list(b), weight)
    unscale_and_clip_(a, one, torch.zeros_like(one), max_norm)


def concatenated_gate_(
    a: Sequence[Tensor], b: Sequence[Tensor], weight: float, max_angle: float, max_norm: float
) -> None:
    """The whole gate in plain PyTorch: flat copies, the cosine on the host, a loop, clipping."""
    dot, a_squared, b_squared = concatenated_dot_norm(a, b).tolist()
    cosine = dot / (a_squared * b_squared) ** 0.5
    if cosine >= math.cos(math.radians(max_angle)):
        for x, y in zip(a, b, strict=True):
            x.mul_(1 - weight).add_(y, alpha=weight)
    factor = _clip_factor(a, max_norm)
    for x in a:
        x.mul_(factor)


def stacked_pcgrad(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """TorchJD's PCGrad of the Jacobian [2, n], the two flat gradients."""
    from torchjd.aggregation import PCGrad

    jacobian = torch.stack([torch.cat([x.reshape(-1) for x in tensors]) for tensors in (a, b)])
    return PCGrad()(jacobian)


def gramian_pcgrad(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """TorchJD's PCGrad from the sum of the tensors' Gramians, without one Jacobian of them all.

    Each tensor's Jacobian [2, ...] is stacked here, as TorchJD's backward pass leaves it.
    """
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad

    parameters = [x.detach().requires_grad_() for x in a]
    for parameter, x, y in zip(parameters, a, b, strict=True):
        parameter.jac = torch.stack([x, y])  # type: ignore[attr-defined]
    jac_to_grad(parameters, PCGrad(), optimize_gramian_computation=True)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def apex_dot_norm(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(a . b, |a|^2, |b|^2) with apex's multi_tensor_l2norm and a loop of dot products."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    overflow = torch.zeros(1, dtype=torch.int, device=a[0].device)
    norms = [
        multi_tensor_applier(amp_C.multi_tensor_l2norm, overflow, [list(tensors)], False)[0]
        for tensors in (a, b)
    ]
    return torch.stack([_sum_of_dots(a, b), *(norm.square().reshape(()) for norm in norms)])
