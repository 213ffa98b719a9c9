"""Whether a packed forward is the padded one: a few made-up rows, computed both ways, in values and gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import compat


# The largest difference of log-probabilities, in nats, between a packed and a padded forward in fp32; and the largest
# mean difference in half precision, where single tokens differ by as much as two padded forwards do.
TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-3, 0.05

# The largest difference of gradients: in fp32 for each parameter, relative to its gradient's norm, or to a thousandth
# of the largest norm where that is more, because some gradients are 0 but for rounding. In half precision for all
# parameters together. A parameter that has a gradient in one and none in the other is found in both.
GRADIENT_TOLERANCE, HALF_PRECISION_GRADIENT_TOLERANCE, SMALLEST_NORM, ROUNDING = 1e-2, 0.3, 1e-3, 1e-6

# Gradients of so many numbers are held at once, twice: those of all parameters could take more than training does.
NUMBERS_AT_ONCE = 2**27


def made_up_rows(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A few short rows, two for each prompt, as TRL lays them out: token ids, mask, columns of the completions."""
    # which prompt, its length, and the completion's length
    rows = ((0, 9, 7), (1, 3, 12), (0, 9, 12), (1, 3, 1))
    width = 12
    ids = torch.randint(vocab_size, (len(rows), width + width), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, (prompt, prompt_tokens, completion_tokens) in enumerate(rows):
        ids[row, :width] = ids[prompt, :width]
        mask[row, width - prompt_tokens : width + completion_tokens] = 1
    return ids, mask, width


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it the model is in evaluation mode; behind it modes and random generators are as they were."""
    modes = {module: module.training for module in model.modules()}
    with compat.generators_restored(device):
        model.eval()
        try:
            yield
        finally:
            model.train(modes[model])
            for module, mode in modes.items():
                module.training = mode


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained; none where processes hold parts of them, which autograd cannot be asked for."""
    if compat.holds_parts_of_parameters(model):
        return {}
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def difference_of_logps(packed: torch.Tensor, padded: torch.Tensor, mask: torch.Tensor, is_half: bool) -> str | None:
    """What speaks against packing in log-probabilities `(B, C)`, of which those under the mask count."""
    differences = (packed - padded).detach().abs()[mask]
    difference = float(differences.mean() if is_half else differences.max())
    tolerance = HALF_PRECISION_TOLERANCE if is_half else TOLERANCE
    if difference <= tolerance:
        return None
    return (
        f"log-probabilities of a packed forward differ by {difference:.2g} nats from those of a padded one "
        f"(tolerance {tolerance})"
    )


def difference_of_gradients(
    packed: torch.Tensor, padded: torch.Tensor, parameters: dict[str, nn.Parameter], is_half: bool
) -> str | None:
    """What speaks against packing in the gradients of the same sum of log-probabilities, `(B, C)`.

    They are taken beside what a backward would do: no parameter's `grad`, no hook of an engine and no process but this
    one takes part.
    """
    weights = torch.randn(padded.shape, generator=torch.Generator().manual_seed(0)).to(padded)
    norms, found_norms, differences = {}, {}, {}
    for names in _at_once(parameters):
        chosen = [parameters[name] for name in names]
        try:
            of_padded = _gradients((weights * padded).sum(), chosen)
        except RuntimeError:  # autograd refuses, as it does where a model has reentrant checkpoints of its own
            return None
        of_packed = _gradients((weights * packed).sum(), chosen)
        for name, found, expected in zip(names, of_packed, of_padded, strict=True):
            norms[name], found_norms[name] = _norm(expected), _norm(found)
            if found is None or expected is None:
                differences[name] = max(norms[name], found_norms[name])
            else:
                differences[name] = _norm(found - expected)
    largest = max(norms.values(), default=0.0)
    lost = [name for name, norm in norms.items() if found_norms[name] == 0.0 and norm > ROUNDING * largest]
    if is_half:
        of_all, difference = (sum(value**2 for value in values.values()) ** 0.5 for values in (norms, differences))
        if not lost and not difference <= HALF_PRECISION_GRADIENT_TOLERANCE * of_all:
            lost = list(parameters)
    else:
        lost += [
            name
            for name, difference in differences.items()
            if not difference <= GRADIENT_TOLERANCE * max(norms[name], SMALLEST_NORM * largest) and name not in lost
        ]
    if not lost:
        return None
    others = f" and {len(lost) - 3} others" if len(lost) > 3 else ""
    return f"a packed forward's gradient is not a padded one's for {', '.join(lost[:3])}{others}"


def _gradients(total: torch.Tensor, parameters: list[nn.Parameter]) -> tuple[torch.Tensor | None, ...]:
    if not total.requires_grad:
        return (None,) * len(parameters)
    return torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)


def _norm(gradient: torch.Tensor | None) -> float:
    return 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient, dtype=torch.float32))


def _at_once(parameters: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        if names and size + parameter.numel() > NUMBERS_AT_ONCE:
            yield names
            names, size = [], 0
        names.append(name)
        size += parameter.numel()
    if names:
        yield names


def computes_in_half_precision(model: Any, mixed_precision: str) -> bool:
    """Whether a model's forward pass is in 16 bits, by autocast or by its weights."""
    return mixed_precision != "no" or any(
        parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters()
    )
