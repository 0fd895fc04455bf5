"""Released checkpoints into packs: which bits every expert gets, and writing them so that nothing is done twice."""

from hybrid.convert.estimate import estimate
from hybrid.convert.plan import INT4, Plan, Settings, parse_mix
from hybrid.convert.quantize import quantize
from hybrid.convert.report import summarise
from hybrid.convert.run import PartDone, Reports

__all__ = ["INT4", "PartDone", "Plan", "Reports", "Settings", "estimate", "parse_mix", "quantize", "summarise"]
