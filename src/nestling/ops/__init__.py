"""Pure functions: each fast form beside its definition."""

from nestling.ops.conv import short_convolution
from nestling.ops.delta_rule import DeltaRule, delta_rule, delta_rule_reference
from nestling.ops.orthogonalize import orthogonalize

__all__ = ["DeltaRule", "delta_rule", "delta_rule_reference", "orthogonalize", "short_convolution"]
