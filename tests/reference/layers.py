"""What the layers of a whole model see in a batch: inputs, and gradients of outputs.

Without hooks and without unfolding: the forward of each layer is replaced by one that notes its
input and adds a zero *probe* to its output, whose gradient is that of the output. The patches of a
convolution are cut out one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tests.reference.columns import ReferenceColumns

Loss = Callable[[nn.Module, Any], Tensor]
Case = tuple[nn.Module, Loss, list[Any]]  # model, loss, batches

LAYERS = (nn.Linear, Conv1D, nn.Conv2d)


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One layer in one batch, or in several one after the other.

    Attributes:
        inputs: a [N, S, B], with a last entry of one where the layer has a bias.
        outputs: g [N, S, M], the gradient of the loss at each output.
    """

    module: nn.Module
    inputs: Tensor
    outputs: Tensor

    def gradient(self) -> Tensor:
        """Sum of g a^T [M, B]: the gradient of weight and bias."""
        return torch.einsum("nsm,nsb->mb", self.outputs, self.inputs)

    def columns(self, valid: Tensor | None = None) -> ReferenceColumns:
        """The scaled columns: a / sqrt(T) and g sqrt(T).

        Args:
            valid: [N, S], false where a position is padding; ``None``: none is.
        """
        n, s = self.inputs.shape[:2]
        valid = torch.ones(n, s, dtype=torch.bool) if valid is None else valid
        root = valid.sum().double().sqrt()
        mask = valid.unsqueeze(-1)
        return ReferenceColumns(
            inputs=mask * self.inputs / root, outputs=mask * self.outputs * root
        )

    def reduced_columns(self, valid: Tensor | None = None) -> ReferenceColumns:
        """One position per sample: the mean input / sqrt(N), the sum of g times sqrt(N).

        Args:
            valid: as in :meth:`columns`; the mean is that of the valid positions.
        """
        n, s = self.inputs.shape[:2]
        valid = torch.ones(n, s, dtype=torch.bool) if valid is None else valid
        mask = valid.unsqueeze(-1).double()
        mean = (mask * self.inputs).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        total = (mask * self.outputs).sum(1, keepdim=True)
        return ReferenceColumns(inputs=mean / n**0.5, outputs=total * n**0.5)


def capture(model: nn.Module, loss: Loss, batches: Sequence[Any]) -> dict[str, LayerRecord]:
    """Every layer by name, for the mean of the losses of the batches (accumulated in one step).

    The model's own ``.grad`` are left alone. A layer that a batch uses more than once has its
    positions one after the other.
    """
    parts = [_capture_one(model, loss, batch, 1.0 / len(batches)) for batch in batches]
    return {
        name: LayerRecord(
            module=record.module,
            inputs=torch.cat([part[name].inputs for part in parts]),
            outputs=torch.cat([part[name].outputs for part in parts]),
        )
        for name, record in parts[0].items()
    }


def weight_gradient(module: nn.Module) -> Tensor:
    """``.grad`` of a layer as [M, B], that of the bias as its last column."""
    grad = module.weight.grad
    grad = grad.T if isinstance(module, Conv1D) else grad.flatten(1)
    return grad if module.bias is None else torch.cat([grad, module.bias.grad[:, None]], dim=1)


@dataclass
class _Probes:
    """The calls of one layer in one forward pass."""

    module: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    probes: list[Tensor] = field(default_factory=list)

    @contextmanager
    def attached(self) -> Any:
        original = self.module.forward

        def forward(x: Tensor) -> Tensor:
            y = original(x)
            probe = torch.zeros_like(y, requires_grad=True)
            self.inputs.append(x.detach().clone())
            self.probes.append(probe)
            return y + probe

        self.module.forward = forward
        try:
            yield self
        finally:
            del self.module.forward


def _capture_one(model: nn.Module, loss: Loss, batch: Any, weight: float) -> dict[str, LayerRecord]:
    with ExitStack() as stack:
        calls = {
            name: stack.enter_context(_Probes(module).attached())
            for name, module in model.named_modules()
            if isinstance(module, LAYERS)
        }
        total = weight * loss(model, batch)
    calls = {name: probes for name, probes in calls.items() if probes.probes}
    grads = iter(torch.autograd.grad(total, [p for c in calls.values() for p in c.probes]))
    records = {}
    for name, of_layer in calls.items():
        module = of_layer.module
        records[name] = LayerRecord(
            module=module,
            inputs=torch.cat([_positions(module, x) for x in of_layer.inputs], dim=1),
            outputs=torch.cat([_outputs(module, next(grads)) for _ in of_layer.probes], dim=1),
        )
    return records


def _positions(module: nn.Module, x: Tensor) -> Tensor:
    """a [N, S, B] of an input."""
    rows = _patches(module, x) if isinstance(module, nn.Conv2d) else _sequence(x)
    if module.bias is None:
        return rows
    return torch.cat([rows, torch.ones(*rows.shape[:2], 1, dtype=rows.dtype)], dim=2)


def _outputs(module: nn.Module, g: Tensor) -> Tensor:
    """g [N, S, M] of an output's gradient."""
    if isinstance(module, nn.Conv2d):  # [N, M, H, W]
        return torch.stack([image.reshape(len(image), -1).T for image in g])
    return _sequence(g)


def _sequence(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, x.shape[-1])


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position sees, in the order of ``weight.flatten(1)``."""
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise NotImplementedError("one group, zeros as padding, given in numbers")
    (high, wide), (down, across) = module.kernel_size, module.stride
    (above, beside), (gap_down, gap_across) = module.padding, module.dilation
    padded = torch.zeros(
        *x.shape[:2], x.shape[2] + 2 * above, x.shape[3] + 2 * beside, dtype=x.dtype
    )
    padded[:, :, above : above + x.shape[2], beside : beside + x.shape[3]] = x
    spans = (high - 1) * gap_down + 1, (wide - 1) * gap_across + 1
    samples = []
    for image in padded:
        patches = []
        for top in range(0, image.shape[1] - spans[0] + 1, down):
            for left in range(0, image.shape[2] - spans[1] + 1, across):
                entries = [
                    image[channel, top + i * gap_down, left + j * gap_across]
                    for channel in range(len(image))
                    for i in range(high)
                    for j in range(wide)
                ]
                patches.append(torch.stack(entries))
        samples.append(torch.stack(patches))
    return torch.stack(samples)


def tiny_mlp() -> Case:
    """Two layers with biases under a cross entropy; three batches of six."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        batches = [
            (torch.randn(6, 7, dtype=torch.float64), torch.randint(4, (6,))) for _ in range(3)
        ]
    return model, _cross_entropy, batches


def tiny_gpt2_block() -> Case:
    """GPT-2 of one layer, width 8, two heads; three batches of three sequences of five tokens.

    Its ``lm_head`` shares the weight of the embedding, so that ``.grad`` there is not the layer's.
    """
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 5}
    plain = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**sizes, **plain, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double()
        # As initialised (0.02) its layers hardly see one another.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0.0, 0.3)
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        batches = [{"input_ids": torch.randint(11, (3, 5))} for _ in range(3)]
    return model, _next_token, batches


def tiny_conv_net() -> Case:
    """A padded and a strided convolution and a linear layer; three batches of three images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(3, 4, (3, 2), stride=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).double()
        batches = [
            (torch.randn(3, 2, 5, 5, dtype=torch.float64), torch.randint(3, (3,))) for _ in range(3)
        ]
    return model, _cross_entropy, batches


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def _next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Not the model's own loss, which takes the logits in float32."""
    tokens = batch["input_ids"]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
