"""Optimizers as classes: ``SharedBasisAdagrad(model.named_parameters(), lr=1e-3, rank=32)``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.registry import resolve


class NamedOptimizer(PreconditionedOptimizer):
    """Base of the classes that stand for one registry name.

    Args:
        params: parameters, ``(name, parameter)`` pairs or param groups. Views follow from shapes:
            give a module to :func:`hf_precond.create_optimizer` to have embeddings left to the
            fallback. Optimizers that look inside the layers need ``optimizer.attach(model)``.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        **options: the options of the optimizer, see :func:`hf_precond.option_specs`.

    Raises:
        ValueError: for an unknown option or a value that is not allowed.
    """

    registry_name: ClassVar[str]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        recipe = resolve(self.registry_name, options)
        super().__init__(params, recipe, lr=lr, weight_decay=weight_decay)


class SharedBasisAdagrad(NamedOptimizer):
    """Shared-basis block low-rank Adagrad (Yen et al. 2023, Algorithm 1)."""

    registry_name = "shared_basis_adagrad"


class SharedBasisAdam(NamedOptimizer):
    """Shared-basis block low-rank Adam (Yen et al. 2023, appendix 6.9)."""

    registry_name = "shared_basis_adam"


class TwoSidedBasis(NamedOptimizer):
    """Adam in low-rank bases of both sides and outside of them."""

    registry_name = "two_sided_basis"


class Shampoo(NamedOptimizer):
    """Shampoo in tiles (Gupta et al. 2018, Anil et al. 2020)."""

    registry_name = "shampoo"


class Sketchy(NamedOptimizer):
    """Shampoo with frequent-directions sketches (Feinberg et al. 2023)."""

    registry_name = "sketchy"


class BlockAdam(NamedOptimizer):
    """Full-matrix Adam over small blocks of each output neuron (Yun et al. 2022)."""

    registry_name = "block_adam"


class FullMatrixAdagrad(NamedOptimizer):
    """Full-matrix Adagrad on small tensors (Duchi et al. 2011)."""

    registry_name = "full_matrix_adagrad"


class AdaFD(NamedOptimizer):
    """Full-matrix Adagrad in a frequent-directions sketch (Wan and Zhang 2018)."""

    registry_name = "ada_fd"


class SonFD(NamedOptimizer):
    """Sketched online Newton (Luo et al. 2016)."""

    registry_name = "son_fd"


class AdaDiag(NamedOptimizer):
    """Adam in the basis of the gradient's left singular vectors (Nguyen et al. 2024)."""

    registry_name = "adadiag"


class AdaDiagPP(NamedOptimizer):
    """AdaDiag++: Adam in the bases of both singular vectors (Nguyen et al. 2024)."""

    registry_name = "adadiag_pp"


class AdafacDiag(NamedOptimizer):
    """Adafactor in the basis of the gradient's left singular vectors (Nguyen et al. 2024)."""

    registry_name = "adafacdiag"


class AdafacDiagPP(NamedOptimizer):
    """AdafacDiag++: Adafactor in the bases of both singular vectors (Nguyen et al. 2024)."""

    registry_name = "adafacdiag_pp"


class NGPlus(NamedOptimizer):
    """NG+ with mini-batch curvature (Yang et al. 2021)."""

    registry_name = "ng_plus"


class SOAP(NamedOptimizer):
    """Adam in the eigenbases of Shampoo's factors (Vyas et al. 2024)."""

    registry_name = "soap"


class Muon(NamedOptimizer):
    """Momentum with its singular values brought to one (Jordan et al. 2024)."""

    registry_name = "muon"


class NGPlusPerSample(NamedOptimizer):
    """NG+ with curvature from per-sample gradients (Yang et al. 2021)."""

    registry_name = "ng_plus_per_sample"


class KFAC(NamedOptimizer):
    """K-FAC with full decompositions (Martens and Grosse 2015)."""

    registry_name = "kfac"


class RSKFAC(NamedOptimizer):
    """K-FAC with randomized singular value decompositions (Puiu 2022)."""

    registry_name = "rs_kfac"


class SREKFAC(NamedOptimizer):
    """K-FAC with randomized symmetric eigenvalue decompositions (Puiu 2022)."""

    registry_name = "sre_kfac"


class BKFAC(NamedOptimizer):
    """K-FAC with eigenpairs updated online (Puiu 2022)."""

    registry_name = "b_kfac"


class BRKFAC(NamedOptimizer):
    """B-KFAC overwritten by randomized decompositions (Puiu 2022)."""

    registry_name = "b_r_kfac"


class BKFACC(NamedOptimizer):
    """B-KFAC with random directions corrected (Puiu 2022)."""

    registry_name = "b_kfac_c"


class SENG(NamedOptimizer):
    """Sketchy empirical natural gradient (Yang et al. 2021)."""

    registry_name = "seng"
