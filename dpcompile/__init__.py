"""dpcompile: differentially private training of PyTorch models, by compilation."""

from dpcompile.adaptive import AdaptiveClipping
from dpcompile.api import dpcompile
from dpcompile.errors import (
    BatchMixingError,
    CaptureError,
    DPCompileError,
    InvalidGraphError,
    NoRuleError,
    PrivacyError,
)
from dpcompile.fix import fix
from dpcompile.optimizer import AdamBC
from dpcompile.plan import Plan
from dpcompile.private import Private, make_private
from dpcompile.probe import check_loss
from dpcompile.runtime import DPModule
from dpcompile.schemes import Stated

__version__ = "0.1.0"

__all__ = [
    "AdamBC",
    "AdaptiveClipping",
    "BatchMixingError",
    "CaptureError",
    "DPCompileError",
    "DPModule",
    "InvalidGraphError",
    "NoRuleError",
    "Plan",
    "PrivacyError",
    "Private",
    "Stated",
    "__version__",
    "check_loss",
    "dpcompile",
    "fix",
    "make_private",
]
