"""Tables of what this distribution adds; nothing is imported until it is asked for."""

PASSES = {
    "negate-twice": "planish_example.passes:NegateTwice",
    "negate-gelu": "planish_example.passes:NegateGelu",
}
BACKENDS = {"evaluator": "planish_example.backend:Evaluator"}
