from typing import Any
from dpcompile.plan import Plan
def plan_text(plan: Plan) -> str:
    return "\n".join(f"{p.group} {p.module} {p.op} {p.kind} x{p.uses} {p.sizes} {plan.choices[g.name]}" for g in plan.costs.groups for p in g.parts)
def plan_dict(plan: Plan) -> dict[str, Any]: return {}
