"""dpcompile: differentially private training of PyTorch models, by compilation."""

from dpcompile.api import dpcompile
from dpcompile.errors import (
    BatchMixingError,
    CaptureError,
    DPCompileError,
    InvalidGraphError,
    NoRuleError,
    PrivacyError,
)
from dpcompile.plan import Plan
from dpcompile.private import Private, make_private
from dpcompile.runtime import DPModule

__version__ = "0.1.0"

__all__ = [
    "BatchMixingError",
    "CaptureError",
    "DPCompileError",
    "DPModule",
    "InvalidGraphError",
    "NoRuleError",
    "Plan",
    "PrivacyError",
    "Private",
    "__version__",
    "dpcompile",
    "make_private",
]
