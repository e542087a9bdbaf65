"""Flags with which XLA compiles small programs for CPUs quickly: they run once or twice."""

from importlib.metadata import version

# Without this emitter compiling takes half as long. XLA ends the process at a flag that it does not know: from 0.11 on.
QUICK = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
