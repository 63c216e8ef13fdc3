"""Inputs and outputs of the classifiers of any Hugging Face model: the representations of ACL.

The last linear layer of a text classifier reads the representation h of a text, and the rows of its
weight are the label embeddings. Hooks note both in the forward pass, so that the model is called
as it is: wrapped for several processes, compiled, with adapters.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..model.exits import Exit, Exits
from ..objectives.gate_cut import top_layers

# Key of the reads in the output of a model.
READS = "classifier_reads"


class Read(NamedTuple):
    """A call of a classifier.

    inputs: representations [N, d], or [N, T, d] of a classifier that reads every token.
    logits: [N, K] or [N, T, K].
    weight: label embeddings [K, d].
    """

    inputs: Tensor
    logits: Tensor
    weight: Tensor


class Classifiers:
    """The classifiers of a model, one per exit; until `remove`, its output says what they read.

    The output of every forward pass that builds a graph becomes a dictionary, with one `Read` per
    classifier under `READS`. They travel in the output, not in an attribute, because FSDP and the
    like search a model's output for the tensors whose backward pass they hook.

    Args:
        model: `MultiExitForSequenceClassification`, or any model for sequence classification whose
            last layer is linear; either may be wrapped by PEFT.

    Raises:
        TypeError, ValueError: the model has no such classifier, or does not classify texts by one
            label of several.
    """

    def __init__(self, model: nn.Module) -> None:
        self._outermost = model
        get_base = getattr(model, "get_base_model", None)
        base: Any = model if get_base is None else get_base()
        check_task(base)
        self.model = base
        exits = getattr(base, "exits", None)
        self.exit_layers: list[int] | None = None
        # The modules that end in each classifier; None for a model with one, whose head is whatever
        # lies outside the encoder.
        self.heads: list[nn.Module] | None = None
        if isinstance(getattr(exits, "heads", None), list):
            self.exit_layers = list(base.exit_layers)
            self.heads = list(cast(Exits, exits).heads)
            self.linears = [_checked(cast(Any, head).classifier) for head in self.heads]
        else:
            self.linears = [find_classifier(base)]
        self._reads: list[Read | None] = [None] * len(self.linears)
        # Input of the last classifier (DistributedDataParallel's output would be a copy), and the
        # state of each text [N, H] that its exit read: the first token's, or the mean.
        self.last_input: Tensor | None = None
        self.text_states: Tensor | None = None
        self._handles = [
            linear.register_forward_hook(partial(self._note, index))
            for index, linear in enumerate(self.linears)
        ]
        if self.heads is not None:
            self._handles.append(self.heads[-1].register_forward_pre_hook(self._note_states))
        self._handles.append(model.register_forward_hook(self._add_reads))
        self._is_compared = False

    def __len__(self) -> int:
        return len(self.linears)

    def _note(self, index: int, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if torch.is_grad_enabled():
            # A copy: under ZeRO 3 and FSDP the weight is gathered only while its layer runs.
            self._reads[index] = Read(args[0], out, cast(Tensor, module.weight) * 1.0)
            if index == len(self.linears) - 1:
                self.last_input = args[0]

    def _note_states(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self.text_states = cast(Exit, module).text_states(*args).detach()

    def _add_reads(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        if not isinstance(output, Mapping):
            raise ValueError(
                f"{type(self.model).__name__} answers with a {type(output).__name__}: set "
                "model.config.return_dict = True."
            )
        reads, self._reads = self._reads, [None] * len(self.linears)
        return {**output, READS: reads}

    def keep_whole(self) -> None:
        """Let ZeRO 3 gather the label embeddings for the passes of the whole model.

        A contrastive loss reaches them without the backward pass of their own layer.
        """
        sharded = [part.weight for part in self.linears if hasattr(part.weight, "ds_tensor")]
        if sharded:
            import deepspeed

            for weight in sharded:
                deepspeed.zero.register_external_parameter(self._outermost, weight)

    def take(self, output: dict[str, Any]) -> list[Read]:
        """Take the reads out of an output: [N, d], [N, K] and [K, d] per exit.

        Raises:
            ValueError: the answer of the model is not that of the classifier.
        """
        found = output.pop(READS)
        if any(read is None for read in found):
            raise ValueError(
                f"{type(self.model).__name__}: its forward pass did not call its classifier. Call "
                "the whole model, not its encoder."
            )
        # A wrapper that casts all tensors of an output may have rebuilt the tuples.
        reads = [Read(*read) for read in found]
        return [self._of_texts(reads[0], output.get("logits"))] if self.heads is None else reads

    def _of_texts(self, read: Read, logits: Tensor | None) -> Read:
        """One representation per text of a classifier that may have read every token."""
        if logits is None or logits.dim() != 2:
            raise ValueError(
                f"{type(self.model).__name__} gives no logits [N, K] in its output. Use a model "
                "for sequence classification."
            )
        if read.logits.dim() == 3:
            # Decoders score every token and answer with the scores of the last one.
            same = (read.logits.detach().to(logits.dtype) == logits.detach()[:, None]).all(-1)
            chosen = same.int().argmax(dim=1)
            rows = torch.arange(len(chosen), device=chosen.device)
            read = Read(read.inputs[rows, chosen], read.logits[rows, chosen], read.weight)
        if not self._is_compared:
            # Once, because the host waits for the device.
            answer = read.logits.detach().to(logits.dtype)
            if not torch.equal(answer, logits.detach()):
                raise ValueError(
                    f"{type(self.model).__name__}: its logits are not the output of its linear "
                    "classifier alone, so its weight holds no label embeddings. Use a model that "
                    "ends in an nn.Linear."
                )
            self._is_compared = True
        return read

    def top_parameters(self, num_top: int) -> list[Parameter]:
        """Trained parameters of the last `num_top` encoder layers and of all after them.

        Raises:
            ValueError: the encoder has fewer layers, or they are not found.
        """
        encoder = self.encoder
        chosen = [p for layer in top_layers(encoder, num_top) for p in layer.parameters()]
        if self.heads is not None:
            after = getattr(encoder, "final_norm", None)
            for module in (self.heads[-1], *([] if after is None else [after])):
                chosen += module.parameters()
        else:
            # Modules of an encoder above its layers, such as a norm or a pooler, come after them.
            inside = list(encoder.parameters())
            last = max(i for i, p in enumerate(inside) if p is chosen[-1])
            chosen += inside[last + 1 :]
            below = {id(p) for p in inside}
            chosen += [p for p in self.model.parameters() if id(p) not in below]
        return [p for p in dict.fromkeys(chosen) if p.requires_grad]

    def parameters_below(self) -> list[Parameter]:
        """Trained parameters below the last classifier, on which its representations depend."""
        modules = [self.model] if self.heads is None else [self.encoder, self.heads[-1]]
        own = set(self.linears[-1].parameters())
        found = dict.fromkeys(p for module in modules for p in module.parameters())
        return [p for p in found if p.requires_grad and p not in own]

    @property
    def encoder(self) -> Any:
        """The part of the model below its classifiers."""
        return self.model.backbone if self.heads is not None else self.model.base_model

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def check_task(model: Any) -> None:
    """Refuse a model that does not give each text one label of several.

    Raises:
        TypeError, ValueError: it has no configuration, or another task.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_labels"):
        raise TypeError(
            f"model: {type(model).__name__} is not a model of transformers with num_labels in its "
            "configuration. Use AutoModelForSequenceClassification, "
            "MultiExitForSequenceClassification, or GradientGate in a loop of your own."
        )
    kind = getattr(config, "problem_type", None)
    if kind in ("regression", "multi_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"model: problem_type={kind!r}, num_labels={config.num_labels}. The contrastive loss "
            "needs one class of several for each text: set num_labels to at least 2 and leave "
            "problem_type out."
        )


def find_classifier(model: Any) -> nn.Linear:
    """The last linear layer with num_labels outputs outside the encoder.

    Raises:
        ValueError: there is none, or an adapter such as LoRA, or quantization, replaces its weight.
    """
    encoder = model.base_model
    inside = set() if encoder is model else {id(module) for module in encoder.modules()}
    number = model.config.num_labels
    wrong_size: list[str] = []
    adapted: tuple[str, ...] = ()
    found: tuple[str, nn.Module] | None = None
    for name, module in model.named_modules():
        # PEFT keeps what it replaced beside the module that answers, and what it added within it.
        if id(module) in inside or "original_module" in name or name.startswith(adapted):
            continue
        base = getattr(module, "base_layer", module)
        if not isinstance(base, nn.Linear):
            continue
        if base is not module:
            adapted = (*adapted, f"{name}.")
        if base.out_features == number:
            found = (name, module)
        else:
            wrong_size.append(f"{name} ({base.out_features} outputs)")
    if found is None:
        seen = f"; its linear layers: {', '.join(wrong_size)}" if wrong_size else ""
        raise ValueError(
            f"model: {type(model).__name__} has no linear classifier with num_labels={number} "
            f"outputs outside its encoder{seen}. The rows of the classifier's weight are the label "
            "embeddings: use a model that ends in an nn.Linear, or objective=ce with transformers' "
            "Trainer."
        )
    return _checked(found[1], found[0])


def _checked(module: nn.Module, name: str | None = None) -> nn.Linear:
    """The classifier of that name, or of an exit."""
    # A layer inside PEFT's low-rank adapter is no nn.Linear of its own.
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        remedy = "Set modules_to_save=['exits']" if name is None else "Name it in modules_to_save"
        raise ValueError(
            f"model: the classifier {name or 'of an exit'} is a {type(module).__name__}, whose "
            f"weight is not the one its output uses (an adapter or quantization). {remedy}, so "
            "that it is trained whole, and leave it out of target_modules and of quantization."
        )
    return module
