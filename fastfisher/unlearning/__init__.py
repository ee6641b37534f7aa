"""Unlearning methods, fine-tuning, and what is measured on the way.

Importing a method's module registers it: a new method is a new file and its name below.
"""

from __future__ import annotations

from . import (  # noqa: F401
    activation_mask,
    finetune,
    fisher_mask,
    fisher_noise,
    grad_mask,
    head_controls,
    influence,
    l1_sparse,
    negative_gradient,
    random_mask,
    retrain,
    salun,
    scrub,
    ssd,
    tfidf,
)
from .api import unlearn
from .base import Edit, Job, Method, methods, register
from .fisher_scores import batch_mean_fisher
from .loop import EpochStats, train
from .metrics import accuracy
from .recipe import TrainRecipe
from .result import EpochRecord, UnlearnResult
from .search import Candidate, Search, search_mask

__all__ = [
    "Candidate",
    "Edit",
    "EpochRecord",
    "EpochStats",
    "Job",
    "Method",
    "Search",
    "TrainRecipe",
    "UnlearnResult",
    "accuracy",
    "batch_mean_fisher",
    "methods",
    "register",
    "search_mask",
    "train",
    "unlearn",
]
