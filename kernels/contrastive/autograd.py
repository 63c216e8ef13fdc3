"""Autograd of the implementations: an autograd.Function, and operators for torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, BatchShape

# The fields of `Batch`, then whether samples and label embeddings are trained.
FORWARD_SCHEMA = (
    "(Tensor embeddings, Tensor labels, Tensor? label_embeddings, Tensor? teacher_embeddings, "
    "Tensor? teacher_label_embeddings, float temperature, str denominator, str reduction, "
    "SymInt ignore_index, SymInt pair_memory, bool trains_samples, bool trains_labels) "
    "-> (Tensor, Tensor[])"
)
# The gradient of the loss, the saved tensors, then the fields of `BatchShape`.
BACKWARD_SCHEMA = (
    "(Tensor loss_gradient, Tensor[] saved, SymInt num_samples, SymInt? num_labels, "
    "SymInt num_classes, SymInt width, float temperature, str denominator, str reduction, "
    "SymInt ignore_index, ScalarType sample_dtype, ScalarType? label_dtype, bool trains_samples, "
    "bool trains_labels, SymInt pair_memory) -> Tensor[]"
)

NO_SECOND_DERIVATIVE = "{} has no second derivative (impl='reference' can be differentiated twice)"

Forward = Callable[..., tuple[Tensor, list[Tensor]]]
Backward = Callable[[Tensor, list[Tensor], BatchShape], list[Tensor]]
BothPasses = tuple[Forward, Backward]


@dataclass(eq=False)
class Passes:
    """Both passes of one implementation as a differentiable function of a batch.

    refusal: why a second derivative is refused, and what to use instead.
    forward: (batch, trains_samples, trains_labels) -> the loss, and tensors to save.
    backward: (gradient of the loss, saved tensors, shape) -> gradients of the samples and, if they
        are trained, of the label embeddings.
    joint: whether `backward` returns one tensor [.., n, d] for both instead; rows that are not
        trained may be missing at either end.
    inputs_to_save: returns the tensors of the batch that `backward` needs as well.
    """

    refusal: str
    forward: Forward
    backward: Backward
    joint: bool = False
    inputs_to_save: Callable[[Batch], list[Tensor]] = lambda batch: []

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss: a scalar or [E]; for reduction "none" [.., M]."""
        trained = trained_inputs(batch)
        return EagerLoss.apply(self, batch, trained, batch.embeddings, batch.label_embeddings)

    def save(self, ctx: Any, batch: Batch, computed: list[Tensor], *trained: bool) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*computed, *self.inputs_to_save(batch))
        ctx.shape, ctx.joint = batch.shape(*trained), self.joint


class EagerLoss(torch.autograd.Function):
    """Both passes without operator dispatch, which takes a sixth of a loss's time at 32 rows."""

    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        batch: Batch,
        trained: tuple[bool, bool],
        embeddings: Tensor,
        label_embeddings: Tensor | None,
    ) -> Tensor:
        loss, computed = passes.forward(batch, *trained)
        passes.save(ctx, batch, computed, *trained)
        # Not the passes: they may refer to the batch, which would then live as long as the graph.
        ctx.run_backward, ctx.refusal = passes.backward, passes.refusal
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if loss_gradient is None:
            return (None,) * 5
        refuse_second_derivative(ctx.refusal)
        with without_autocast(loss_gradient.device.type):
            gradients = ctx.run_backward(loss_gradient, list(ctx.saved_tensors), ctx.shape)
        return None, None, None, *input_gradients(ctx, gradients)


class Implementation(Passes):
    """Passes that torch.compile sees as operators fusedacl::<name> and fusedacl::<name>_backward.

    impl: name of the implementation in error messages.
    fakes: like the passes, but return empty tensors of the shapes of their results.
    """

    def __init__(
        self, name: str, impl: str, passes: BothPasses, fakes: BothPasses, **options: Any
    ) -> None:
        forward, backward = passes
        fake_forward, fake_backward = fakes
        refusal = NO_SECOND_DERIVATIVE.format(f"impl={impl!r}")
        super().__init__(refusal, forward, backward, **options)

        def forward_operator(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
            with without_autocast(arguments[0].device.type):
                return forward(*batch_of(arguments))

        def backward_operator(gradient: Tensor, saved: list[Tensor], *shape: Any) -> list[Tensor]:
            with without_autocast(gradient.device.type):
                return backward(gradient, saved, BatchShape(*shape))

        # The schemas are explicit because torch 2.6 does not infer them from `list[Tensor]`.
        self.operator = torch.library.custom_op(
            f"fusedacl::{name}", forward_operator, mutates_args=(), schema=FORWARD_SCHEMA
        )
        self.backward_operator = torch.library.custom_op(
            f"fusedacl::{name}_backward", backward_operator, mutates_args=(), schema=BACKWARD_SCHEMA
        )
        self.operator.register_fake(lambda *arguments: fake_forward(*batch_of(arguments)))
        self.backward_operator.register_fake(
            lambda gradient, saved, *shape: fake_backward(gradient, saved, BatchShape(*shape))
        )
        self.operator.register_autograd(self.operator_gradients, setup_context=self.setup_context)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss: a scalar or [E]; for reduction "none" [.., M]."""
        if not torch.compiler.is_compiling():
            return super().loss(batch)
        return self.operator(*batch, *trained_inputs(batch))[0]

    def setup_context(
        self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]
    ) -> None:
        batch, *trained = batch_of(inputs)
        self.save(ctx, batch, output[1], *trained)

    def operator_gradients(
        self, ctx: Any, loss_gradient: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the operator's arguments."""
        samples = labels = None
        if loss_gradient is not None:
            gradients = self.backward_operator(loss_gradient, list(ctx.saved_tensors), *ctx.shape)
            samples, labels = input_gradients(ctx, gradients)
        return samples, None, labels, *(None,) * 9


def batch_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the batch of an operator's arguments, and the arguments after its fields."""
    num_fields = len(Batch._fields)
    return Batch(*arguments[:num_fields]), *arguments[num_fields:]


def trained_inputs(batch: Batch) -> tuple[bool, bool]:
    """Return whether samples and label embeddings need a gradient."""
    if not torch.is_grad_enabled():
        return False, False
    label_embeddings = batch.label_embeddings
    trains_labels = label_embeddings is not None and label_embeddings.requires_grad
    return batch.embeddings.requires_grad, trains_labels


def input_gradients(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients [.., N, d] and [.., K, d] in the inputs' dtypes, None if not trained."""
    shape: BatchShape = ctx.shape
    samples = labels = None
    if shape.trains_samples:
        samples = gradients[0][..., : shape.num_samples, :] if ctx.joint else gradients[0]
        samples = samples.to(shape.sample_dtype)
    if shape.trains_labels and shape.num_labels is not None:
        labels = gradients[-1][..., -shape.num_labels :, :] if ctx.joint else gradients[-1]
        labels = labels.to(shape.label_dtype)
    return samples, labels


def refuse_second_derivative(refusal: str) -> None:
    """Raise RuntimeError in a backward pass of which a graph is wanted.

    PyTorch would treat the gradient as a constant and return wrong second derivatives.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"backward was called with create_graph=True: {refusal}")


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast is off; entering it costs nothing where it already is."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
