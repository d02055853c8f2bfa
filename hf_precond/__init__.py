"""Preconditioned optimizers for PyTorch: ``trainer_ext`` brings them to Hugging Face's Trainer."""

from hf_precond.named import (
    SOAP,
    AdaDiag,
    AdaDiagPP,
    AdafacDiag,
    AdafacDiagPP,
    AdaFD,
    BlockAdam,
    FullMatrixAdagrad,
    Muon,
    NGPlus,
    Shampoo,
    SharedBasisAdagrad,
    SharedBasisAdam,
    Sketchy,
    SonFD,
)
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.registry import (
    create_optimizer,
    list_optimizers,
    optimizer_info,
    option_specs,
    resolve,
)

__version__ = "0.1.0"

__all__ = [
    "PreconditionedOptimizer",
    "SOAP",
    "AdaDiag",
    "AdaDiagPP",
    "AdaFD",
    "AdafacDiag",
    "AdafacDiagPP",
    "BlockAdam",
    "FullMatrixAdagrad",
    "Muon",
    "NGPlus",
    "Shampoo",
    "SharedBasisAdagrad",
    "SharedBasisAdam",
    "Sketchy",
    "SonFD",
    "__version__",
    "create_optimizer",
    "list_optimizers",
    "optimizer_info",
    "option_specs",
    "resolve",
]
