"""The losses of our objective on the batches of somebody else's loop."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ..model.answers import IGNORED
from ..model.multi_exit import MultiExitOutput
from ..objectives.losses import ExitLosses, Teacher, exit_losses
from ..training.stages import SHARED
from .arguments import ACLTrainingArguments
from .classifiers import Classifiers

# Parts that wrappers of inner modules add to the names of parameters.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class TrainerObjective:
    """A model, what of it is trained, and its losses; `close` restores the model.

    What the user has frozen stays frozen.

    Raises:
        TypeError, ValueError: the model has no linear classifier, or the options do not fit it.
    """

    def __init__(self, model: nn.Module, args: ACLTrainingArguments) -> None:
        self.model = model
        self._before = {_plain(name): p.requires_grad for name, p in model.named_parameters()}
        self.classifiers = Classifiers(model)
        try:
            self._set_up(args)
        except BaseException:
            self.close()
            raise

    def _set_up(self, args: ACLTrainingArguments) -> None:
        """Read the options and freeze what the strategy does not train."""
        self.config = args.config_for(len(self.classifiers))
        last = len(self.classifiers) - 1
        self.has_teacher = self.config.optimization.strategy == "two_stage"
        self.positions = tuple(range(last + 1))
        if self.has_teacher:
            self.positions = self.positions[:-1]
        elif self.config.optimization.strategy == "single":
            self.positions = (last,)
        # Modules that a second stage leaves in evaluation mode.
        self.resting: list[nn.Module] = []
        self._choose()
        heads = self.classifiers.heads
        self.trains_encoder = _is_trained(self.classifiers.encoder)
        if heads is not None and not self.trains_encoder:
            # With nothing to train below it, an exit that the user has frozen needs no loss.
            self.positions = tuple(at for at in self.positions if _is_trained(heads[at]))
        if not self.trained():
            raise ValueError("model: no parameter has requires_grad=True, so nothing is trained.")

    def trained(self) -> list[Parameter]:
        """The trained parameters as the model has them now; sharding a model replaces them."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def group_names(self) -> list[str]:
        """Names of the groups that decide for themselves, as in metrics.jsonl.

        There is one for one exit; else one per exit, and one for the encoder if it is trained.
        """
        layers = self.classifiers.exit_layers
        if layers is None or len(self.positions) == 1:
            return ["model"]
        names = [f"exit {layers[position]}" for position in self.positions]
        return [*names, SHARED] if self.trains_encoder else names

    def groups(self) -> list[int]:
        """The index in `group_names` of each trained parameter."""
        heads, names = self.classifiers.heads, self.group_names
        if heads is None or len(names) == 1:
            return [0] * len(self.trained())
        group_of = {
            id(p): index
            for index, position in enumerate(self.positions)
            for p in heads[position].parameters()
        }
        return [group_of.get(id(p), len(names) - 1) for p in self.trained()]

    def _choose(self) -> None:
        """Freeze what the strategy does not train."""
        heads = self.classifiers.heads
        if heads is None:
            return
        if self.has_teacher:
            self.resting = [self.classifiers.encoder, heads[-1]]
        idle = [head for at, head in enumerate(heads) if at not in self.positions]
        for module in (*idle, *self.resting):
            module.requires_grad_(False)

    def losses(
        self, model: nn.Module, inputs: Mapping[str, Any], process_group: ProcessGroup | None
    ) -> tuple[ExitLosses, Any]:
        """Losses of a batch, and the output of the model.

        Args:
            model: ours as the loop has wrapped it, in training mode.
            inputs: its arguments and `labels` [N]; `IGNORED` for a text that counts in no loss.
            process_group: processes whose samples are contrasted with each other.

        Raises:
            ValueError: there are no labels, or they are no class indices.
        """
        batch = dict(inputs)
        labels = checked_labels(batch.pop("labels", None))
        for module in self.resting:
            module.eval()
        output = dict(model(**batch))
        reads = self.classifiers.take(output)
        teacher = None
        if self.has_teacher:
            embeddings, logits, weight = (part.detach() for part in reads[-1])
            teacher = Teacher(embeddings, weight, logits)
        chosen = [reads[position] for position in self.positions]
        embeddings, logits, weights = map(torch.stack, zip(*chosen, strict=True))
        # Under autocast the representations are in half precision and the weights are not.
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, weights.dtype))
        found = MultiExitOutput(exit_logits=logits, exit_embeddings=embeddings)
        losses = exit_losses(
            self.config.objective,
            found,
            weights,
            labels,
            teacher,
            process_group,
            # On the device, where the host does not wait for it.
            num_texts=(labels != IGNORED).sum().clamp(min=1),
        )
        return losses, output

    def close(self) -> None:
        """Restore the model: its hooks, and what it trains."""
        self.classifiers.remove()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._before.get(_plain(name), parameter.requires_grad))


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _plain(name: str) -> str:
    """A parameter's name as it is without wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def checked_labels(labels: Any) -> Tensor:
    """The labels [N] of a batch.

    Raises:
        ValueError: there are none, or they are no class indices.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(
            "The batch has no labels: name the column of the classes 'label' or 'labels' (and keep "
            "it in remove_unused_columns)."
        )
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {list(labels.shape)} and dtype {labels.dtype}: it must hold one "
            "class index per text, [N]."
        )
    return labels
