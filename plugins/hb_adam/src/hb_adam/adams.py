"""Adams: Adam's bounded update, and a decay of each matrix's largest singular value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hbcore.api import (
    Block,
    Context,
    Domain,
    Optimizer,
    OptionError,
    Options,
    Route,
    ScaleByAdam,
    Slot,
    State,
    Transform,
    hyper,
    matrix_view,
)


@dataclass(frozen=True)
class DecaySpectralNorm(Transform):
    r"""Decoupled decay of the largest singular value of ``M x N`` matrices, :math:`u + \lambda \sqrt M \sigma_1 u_1 v_1^\top`.

    .. math::
        v = \frac{W^\top q_{t-1}}{\lVert W^\top q_{t-1} \rVert} \qquad
        q_t = \frac{W v}{\lVert W v \rVert} \qquad
        \sigma_1 u_1 v_1^\top \approx W v v^\top

    That is half the gradient of :math:`\sigma_1^2` (Yoshida and Miyato 2017, arXiv:1705.10941), approximated by one power
    iteration per step that continues from the last one; :math:`q_0` is all ones. The last two dimensions are the matrix, those
    before them a batch. A matrix of zeros has no direction and leaves :math:`q` unchanged.

    Args:
        weight_decay: :math:`\lambda`, at least 0.
        cautious: only where update and decay agree in sign.

    Slots: ``spectral_u``, :math:`q`, ``[M]``. No codec compresses it.
    """

    weight_decay: float = hyper(0.1, ge=0, role="weight_decay")
    cautious: bool = False
    name = "spectral_decay"
    stage = "weight_decay"
    domain = Domain.MATRIX
    needs = frozenset({"param"})

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return matrix_view(shape, merge_dims=False, batch_dims=len(shape) - 2)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"spectral_u": Slot(param.shape[-2:-1], fill=1.0, exact=True)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        w, q = c.param, s["spectral_u"].unsqueeze(-1)
        v = unit(w.mT @ q)
        image = w @ v
        decay = self.weight_decay * math.sqrt(w.shape[-2]) * (image @ v.mT)
        kept = torch.where(u * decay > 0, decay, 0.0) if self.cautious else decay
        turned = torch.where(image.norm(dim=1, keepdim=True) > 0, unit(image), q)
        return u + kept.to(u.dtype), {"spectral_u": turned.squeeze(-1)}


def unit(x: Tensor) -> Tensor:
    """The columns of ``x`` ``[B, n, 1]`` at length 1; a column of zeros stays zero."""
    norm: Tensor = x.norm(dim=1, keepdim=True)
    return x / norm.clamp(min=torch.finfo(x.dtype).tiny)


@dataclass(frozen=True)
class DecayVectors(Transform):
    r"""Decoupled weight decay, :math:`u + \lambda p`, of parameters that are not decayed spectrally.

    Args:
        scalar_vector_weight_decay: :math:`\lambda`, at least 0.
        cautious: only where update and parameter agree in sign.
    """

    scalar_vector_weight_decay: float = hyper(0.1, ge=0, role="weight_decay")
    cautious: bool = False
    name = "vector_decay"
    stage = "weight_decay"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        decay = self.scalar_vector_weight_decay * c.param
        return u + (torch.where(u * c.param > 0, decay, 0.0) if self.cautious else decay), {}


def decays_spectrally(param: Tensor) -> bool:
    """Whether a parameter's last two dimensions are larger than 1, and it is not excluded by ``use_spectral_decay``."""
    return param.ndim > 1 and min(param.shape[-2:]) > 1 and bool(getattr(param, "use_spectral_decay", True))


class Adams(Optimizer):
    r"""Adam's two moments in a bounded update, and spectral weight decay; Adams, https://github.com/imoneoi/Adams.

    .. math::
        p_t = p_{t-1} - \mathrm{lr} \left(
        \operatorname{atan2}(\hat m_t, \sqrt{\hat v_t}) + \lambda \sqrt M\, \sigma_1 u_1 v_1^\top \right)

    with Adam's corrected moments, as in its pseudo-code (its code corrects :math:`m` outside the arc tangent), and the
    largest singular value of :math:`p_{t-1}`, ``M x N``, with its vectors, approximated by one power iteration per step. A
    parameter's last two dimensions are the matrix and those before them a batch. Scalars, vectors and matrices with a dimension
    of size 1 take the plain decay :math:`\lambda_s p_{t-1}` instead, with ``scalar_vector_weight_decay``.

    So do matrices with ``param.use_spectral_decay = False``, or that key in their param group: set it for collections of
    vectors, such as embeddings. Torch drops such attributes when it copies a parameter (``copy.deepcopy``) or replaces it
    (``fully_shard``, so set them afterwards); a group keeps its key.

    Args:
        params: of any floating dtype and shape; complex ones must not be decayed spectrally.
        lr: learning rate; a step moves an element by at most ``lr * pi / 2``, decay aside.
        betas: decay rates of the two moments, in [0, 1).
        weight_decay: :math:`\lambda`, of matrices, at least 0.
        scalar_vector_weight_decay: :math:`\lambda_s`, of all others, at least 0.
        master_dtype: the dtype that the moments are stored in; adams-torch's name for ``storage_dtype``. All is computed in
            float32, or float64 for float64 parameters. For a float32 copy of bfloat16 parameters pass
            ``param_ecc="bf16+16"``.
        use_spectral_decay: False for plain decay of all parameters; a param group may have its own.
        cautious_weight_decay: keep only the elements of either decay that agree in sign with the update.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape; ``spectral_u``, ``[M]``, of a matrix, ``[batch, M]`` of
    a batch of them; ``step``.
    """

    option_defaults: ClassVar[Mapping[str, Any]] = {"division_backend": "atan2", "atan2_scale": 1.0}

    # Written out: weight_decay, a shared option, is positional in adams-torch, and declared fields make it keyword-only.
    def __init__(  # type: ignore[misc]
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        scalar_vector_weight_decay: float = 0.1,
        master_dtype: torch.dtype = torch.float32,
        use_spectral_decay: bool = True,
        **options: Unpack[Options],
    ) -> None:
        if (backend := options.get("division_backend", "atan2")) != "atan2":
            raise OptionError(f"Adams: division_backend={backend!r} would need an eps, which it lacks; leave it at 'atan2'.")
        if master_dtype != torch.float32:
            if "storage_dtype" in options:
                raise OptionError(
                    f"Adams: master_dtype={master_dtype} and storage_dtype are two names of one option; pass one."
                )
            options["storage_dtype"] = master_dtype
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "scalar_vector_weight_decay": scalar_vector_weight_decay,
            "use_spectral_decay": bool(use_spectral_decay),
            "cautious_weight_decay": bool(options.pop("cautious_weight_decay", False)),  # applied by the rule's own decays
        }
        super().__init__(params, hyperparameters, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        direction = ScaleByAdam(h.betas, 0.0)
        plain = DecayVectors(h.scalar_vector_weight_decay, h.cautious_weight_decay)
        if not h.use_spectral_decay:
            return direction, plain
        spectral = DecaySpectralNorm(h.weight_decay, h.cautious_weight_decay)
        return direction, Route(decays_spectrally, (spectral,), (plain,))

    @torch.no_grad()
    def broadcast_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Copy rank 0's values of these tensors to every rank, in place; does nothing without torch.distributed.

        Args:
            buffers: plain tensors, equally many on each rank: ``model.buffers()``.
        """
        if dist.is_available() and dist.is_initialized():
            for buffer in buffers:
                dist.broadcast(buffer, src=0)
