"""What bits and ranks will buy, told before anything is quantised, and a file of choices that `quantize` runs."""

from .file import ModulePlan, Plan, PlanError
from .mix import Mix, largest_rank, mixed, planned
from .modules import PLANNED_BITS, PlannedModule, forecast_modules
from .points import PLAIN_TITLE, SWEEP, Point, plan_points, sweep_rank

__all__ = [
    "PLAIN_TITLE",
    "PLANNED_BITS",
    "SWEEP",
    "Mix",
    "ModulePlan",
    "Plan",
    "PlanError",
    "PlannedModule",
    "Point",
    "forecast_modules",
    "largest_rank",
    "mixed",
    "plan_points",
    "planned",
    "sweep_rank",
]
