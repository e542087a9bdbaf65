"""The phases that a run's time is divided into, by name, as ``time/<name>`` in ``metrics.jsonl``."""

# What the accelerators do for the policy; goodput is their share of all time.
PRODUCTIVE = ("rollout", "reference", "update")
# What every line has the time of; the last four are computed of the others.
STEP_TIMES = ("data", *PRODUCTIVE, "reward_wait", "other", "step", "total", "data_share", "goodput")
# What a run spends beside its steps.
BESIDE = ("startup", "compile", "checkpoint", "evaluation", "profile", "lost")
