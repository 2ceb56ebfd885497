"""Broken, hostile and merely unusual inputs, made from a seed each and tried in processes that may die.

    python -m tests.fuzz graphs --seeds 0:1000 --workers 2

A kind of input is a module of this package with one function ``case(seed, folder)``: it makes the input of this seed in
the empty ``folder``, tries it, and returns a few words on how it ended. A PlanishError that is no bug of ours is a good
end and may be let through; anything else that it raises is a failure, `Wrong` above all.
"""


class Wrong(Exception):
    """A result that differs from the right one without any message."""
