"""Any proximal operator as a module, with parameters that may be learned and then stay positive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ...holding import hold
from .calculus import Indicator
from .thresholds import hard_threshold, top_k_abs

__all__ = ["Prox"]

# These make operators out of others.
_RULES = {"prox_affine", "prox_conjugate", "prox_indicator"}


class Prox(nn.Module):
    """A proximal operator as a module: an activation, a shrinkage with a learned weight, a prior for plug-and-play algorithms.

    Args:
        operator: the name of a function of this package, with or without its prefix ``prox_`` ("soft_threshold", "l2", "nuclear", …), or
            any function ``(x, **parameters) -> x``.
        learn: the parameters that are learned. They begin at the given values and stay positive whatever an optimizer does: each is
            the softplus of a parameter ``raw_…``, and ``module.lam`` is the positive tensor.
        scaled: the parameters that multiply the penalty, which ``.prox`` multiplies by γ. None for those whose name begins with "lam".
        parameters: what the function takes after x, by name. Tensors become buffers, an ``nn.Parameter`` is learned as it is (and refused
            by the operator where it is negative), anything else is passed on.

    Raises:
        ValueError: the operator is not known, or a learned parameter has no value, or not a positive one, to begin with.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import Prox
        >>> Prox("soft_threshold", lam=0.5)(torch.tensor([-2.0, 0.3, 1.5]))
        tensor([-1.5000,  0.0000,  1.0000])
        >>> shrinkage = Prox("soft_threshold", learn="lam", lam=torch.full((3,), 0.5))
        >>> shrinkage
        Prox('soft_threshold', lam: (3,) learned)
        >>> shrinkage.prox(torch.tensor([-2.0, 0.3, 1.5]), gamma=0.4).detach()
        tensor([-1.8000,  0.1000,  1.3000])
    """

    def __init__(
        self,
        operator: str | Callable[..., Tensor],
        *,
        learn: str | Sequence[str] = (),
        scaled: Sequence[str] | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__()
        self.function = _find(operator) if isinstance(operator, str) else operator
        self.learned = (learn,) if isinstance(learn, str) else tuple(learn)
        self.names = tuple(parameters)
        self.options: dict[str, Any] = {}
        missing = [name for name in self.learned if name not in parameters]
        if missing:
            raise ValueError(f"a learned parameter needs a value to begin with; missing: {', '.join(missing)}")
        if scaled is None:
            scaled = [name for name in self.names if name.startswith("lam")]
            known = bool(scaled) or self.function is top_k_abs or isinstance(self.function, Indicator)
        else:
            known = True
        self.scaled = tuple(scaled) if known else None
        for name, value in parameters.items():
            if name in self.learned:
                self.register_parameter(f"raw_{name}", nn.Parameter(_inverse_softplus(name, value)))
            elif isinstance(value, Tensor):
                hold(self, name, value)
            else:
                self.options[name] = value

    def forward(self, x: Tensor) -> Tensor:
        """The operator of the penalty R at x.

        Args:
            x: of the shape that the function takes.
        """
        return self.function(x, **{name: self._value(name) for name in self.names})

    def prox(self, x: Tensor, *args: Any, gamma: Tensor | float = 1.0) -> Tensor:
        """The operator of γR at x, as the priors of plug-and-play algorithms are called (deepinv's, too).

        Args:
            x: of the shape that the function takes.
            args: not used; the place where other priors take a noise level.
            gamma: γ > 0, a number or a tensor that broadcasts against the weights.

        Raises:
            ValueError: γ is not one, and no parameter is known to multiply the penalty.
        """
        values = {name: self._value(name) for name in self.names}
        if isinstance(gamma, Tensor) or gamma != 1:
            if self.scaled is None:
                raise ValueError(
                    f"which of {', '.join(self.names) or 'its parameters'} multiplies the penalty of {_name(self.function)}? "
                    "Name it in Prox(..., scaled=(...)), or pass scaled=() if γ changes nothing, as for the indicator of a set"
                )
            # The hard threshold at λ is the operator of ½λ²‖x‖₀.
            factor = gamma**0.5 if self.function is hard_threshold else gamma
            values |= {name: values[name] * factor for name in self.scaled}
        return self.function(x, **values)

    def extra_repr(self) -> str:
        """The operator, the numbers, and the shapes of the tensors."""
        shown = [repr(_name(self.function))]
        for name in self.names:
            value = self._value(name)
            text = f"{name}: {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name}={value!r}"
            shown.append(f"{text} learned" if name in self.learned else text)
        return ", ".join(shown)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("learned", ()):
            return nn.functional.softplus(self.get_parameter(f"raw_{name}"))
        return super().__getattr__(name)

    def _value(self, name: str) -> Any:
        return self.options[name] if name in self.options else getattr(self, name)


def _find(name: str) -> Callable[..., Tensor]:
    package = import_module(__package__ or "")
    operators = (public for public in package.__all__ if public.startswith("prox_") or public.endswith("_threshold"))
    known = [*(public for public in operators if public not in _RULES), "top_k_abs"]
    for candidate in (name, f"prox_{name}"):
        if candidate in known:
            return getattr(package, candidate)
    raise ValueError(f"the operator {name!r} is not known; choose one of {', '.join(known)}, or pass a function")


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _inverse_softplus(name: str, value: Tensor | float) -> Tensor:
    start = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype()).detach()
    if not bool((start > 0).all()):
        raise ValueError(f"{name} is learned as a positive number, and must begin as one, got {value}")
    return start + torch.log(-torch.expm1(-start))
