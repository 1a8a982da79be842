"""What bits and ranks will buy, told before anything is quantised, and a file of choices that `quantize` runs."""

from .file import QUANTIZERS, ModulePlan, Plan, PlanError, plan_to_follow, without_groups
from .mix import Mix, largest_rank, mixed, planned
from .modules import PLANNED_BITS, PlannedModule, plan_question, planned_modules
from .points import PLAIN_TITLE, SWEEP, Point, affordable, plan_points, sweep_rank
from .ranks import least_budget
from .recipes import EFFORTS, Recipe, recipe_of

__all__ = [
    "EFFORTS",
    "PLAIN_TITLE",
    "PLANNED_BITS",
    "QUANTIZERS",
    "SWEEP",
    "Mix",
    "ModulePlan",
    "Plan",
    "PlanError",
    "PlannedModule",
    "Point",
    "Recipe",
    "affordable",
    "largest_rank",
    "least_budget",
    "mixed",
    "plan_points",
    "plan_question",
    "plan_to_follow",
    "planned",
    "planned_modules",
    "recipe_of",
    "sweep_rank",
    "without_groups",
]
