"""What each family of ops knows about its uses of parameters. The first rule that accepts a call takes it."""

from __future__ import annotations

from dpcompile.rules.sites.base import Call, SiteRule
from dpcompile.rules.sites.broadcast import Broadcast
from dpcompile.rules.sites.contraction import Contraction
from dpcompile.rules.sites.convolution import Convolution
from dpcompile.rules.sites.embedding import Embedding
from dpcompile.rules.sites.fallback import Fallback
from dpcompile.rules.sites.norms import GroupNorm, LayerNorm
from dpcompile.rules.sites.recurrence import Recurrence

# Special before general: the last two take whatever is left.
RULES: tuple[SiteRule, ...] = (
    Contraction(),
    Convolution(),
    Embedding(),
    LayerNorm(),
    GroupNorm(),
    Recurrence(),
    Broadcast(),
    Fallback(),
)
BY_NAME = {rule.name: rule for rule in RULES}


def rule_for(call: Call) -> SiteRule | None:
    """The rule that takes a call; None if no rule can."""
    return next((rule for rule in RULES if rule.accepts(call)), None)
