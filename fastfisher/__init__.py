"""fastfisher: exact diagonal Fisher information for the price of one backward pass."""

from .backends import backend
from .fisher_diag import FallbackWarning, fisher_diag
from .masking import Mask, fisher_mask_, random_mask_
from .result import FisherDiag, FisherGroups
from .unlearning import UnlearnResult, unlearn
from .verify import ParameterCheck, verify

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "FisherDiag",
    "FisherGroups",
    "Mask",
    "ParameterCheck",
    "UnlearnResult",
    "backend",
    "fisher_diag",
    "fisher_mask_",
    "random_mask_",
    "unlearn",
    "verify",
]
