"""The phases that a run's time is divided into, by name, as ``time/<name>`` in ``metrics.jsonl``."""

# The accelerators' work on the policy; goodput is its share of all time.
PRODUCTIVE = ("rollout", "reference", "update")
# Times that are in every line; the last four are computed from the others.
STEP_TIMES = ("data", *PRODUCTIVE, "reward_wait", "other", "step", "total", "data_share", "goodput")
# Phases outside a run's steps.
BESIDE = ("startup", "compile", "checkpoint", "evaluation", "profile", "lost")
