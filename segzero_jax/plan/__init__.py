"""Whether a run fits a TPU slice and what it costs there: ``python -m segzero_jax.plan --config C --topology v5e:4x4``.

Every phase of a step is compiled for the named slice by the TPU compiler itself, on a machine without one (libtpu, the
extra ``tpu``), with the shapes, shardings and programs of ``train``. Memory is what the compiler reserves; FLOPs, bytes
and collectives are counted in the compiled programs; seconds are a roofline from published peaks and assume that
compute, memory and links overlap wherever the program lets them: a lower bound, not a forecast.
"""

from segzero_jax.plan.phases import PhasePlan, Plan, make_plan
from segzero_jax.plan.slices import PlanError

__all__ = ["PhasePlan", "Plan", "PlanError", "make_plan"]
