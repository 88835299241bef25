"""What a run will take: parameters, FLOPs, memory, time and cost, before anything is spent."""

from twofold.train.plan.devices import DEVICES, NAMES, Device, find_device
from twofold.train.plan.plan import DEFAULT_EFFICIENCY, Change, Phase, RunPlan, plan_run

__all__ = [
    "DEFAULT_EFFICIENCY",
    "DEVICES",
    "NAMES",
    "Change",
    "Device",
    "Phase",
    "RunPlan",
    "find_device",
    "plan_run",
]
