"""What became of every site: where each pass fired, where it refused and why, and what it nearly was.

An output keeps these records in `sites.json`, so that `planish explain` needs neither the source nor the passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from pydantic import TypeAdapter, ValidationError

from planish.optimizer.errors import BadInput, CheckFailed, UsageError, first_fault
from planish.optimizer.interfaces import registry
from planish.optimizer.interfaces.option_text import did_you_mean
from planish.optimizer.interfaces.pass_base import Pass, Refusal
from planish.optimizer.ir.graph import operators_of
from planish.optimizer.output.manifest import Manifest, RolledBack
from planish.optimizer.pipeline.pipeline import Outcome, PassReport

SITES = "sites.json"


@dataclass(frozen=True)
class PassSites:
    """The sites of one pass in one component of one target."""

    target: str
    component: str
    text: str
    """The pass with its options."""
    fired: Sequence[str]
    """Where it rewrote: operator, name and, where it is known, module of each node."""
    refusals: Sequence[Refusal]
    """Where it did not: refusals, and near misses."""
    rolled_back: str | None = None
    """Why all of it was undone."""

    @classmethod
    def of(cls, target: str, component: str, report: PassReport) -> PassSites:
        """The sites of a pass report."""
        return cls(target, component, report.text, tuple(report.sites), tuple(report.refusals), report.rolled_back)

    @classmethod
    def undone(cls, target: str, record: RolledBack) -> PassSites:
        """A pass of which nothing is left, as the manifest has it."""
        return cls(target, record.component, record.text, (), (), record.reason)

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.text.partition("{")[0]

    @property
    def refused(self) -> list[Refusal]:
        """Where the pattern stood and something was in the way."""
        return [refusal for refusal in self.refusals if not refusal.near]

    @property
    def near_misses(self) -> list[Refusal]:
        """Where only the heart of the pattern stood."""
        return [refusal for refusal in self.refusals if refusal.near]


_RECORDS = TypeAdapter(list[PassSites])


def write_sites(folder: Path, found: Sequence[PassSites]) -> None:
    """Write `sites.json`: of the passes whose work is in the engines, for a build from a lock has no others."""
    kept = [sites for sites in found if sites.rolled_back is None]
    (folder / SITES).write_bytes(_RECORDS.dump_json(kept, indent=1) + b"\n")


def of_pass(found: Sequence[PassSites], name: str) -> list[PassSites]:
    """The sites of one pass; UsageError if it is in no pipeline."""
    names = list(dict.fromkeys(sites.name for sites in found))
    if name not in names:
        raise UsageError(f"{name!r} is in no pipeline here{did_you_mean(name, names)}", where="--pass")
    return [sites for sites in found if sites.name == name]


def read_sites(folder: Path) -> list[PassSites]:
    """What `sites.json` of an output holds, and the passes that were undone; BadInput if it is no such output."""
    path, manifest = folder / SITES, Manifest.read(folder)
    if not path.is_file():
        raise BadInput(f"there is no {SITES}", where=folder, advice="build it again with this version")
    try:
        kept = _RECORDS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadInput(
            f"cannot be read: {first_fault(error)}", where=path, advice="build it again with this version"
        ) from None
    return [*kept, *(PassSites.undone(name, one) for name, t in manifest.targets.items() for one in t.rolled_back)]


@dataclass(frozen=True)
class Rewritten:
    """What passes did to the components of a target: the sites of every pass, and the operators that they left."""

    sites: Sequence[PassSites]
    operators: Mapping[str, int]
    """Number of nodes by operator, over all components, before the target's own spelling."""
    shipped: Mapping[str, int]
    """The same of the graph that the target compiles."""

    @classmethod
    def of(cls, target: str, outcomes: Mapping[str, Outcome]) -> Rewritten:
        """What pipelines did, by component."""
        sites = [PassSites.of(target, name, report) for name, one in outcomes.items() for report in one.reports]
        canonical = summed(outcome.canonical for outcome in outcomes.values())
        return cls(sites, canonical, summed(operators_of(outcome.model) for outcome in outcomes.values()))


def summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of counts by name."""
    return dict(sorted(sum(map(Counter, counts), Counter[str]()).items()))


@dataclass(frozen=True)
class Expectation:
    """How often a pass must fire (`fuse-attention=12`), or how many nodes of an operator passes must leave
    (`Attention=12`, before the target's own spelling), over all components of a target."""

    name: str
    count: int

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """Read `PASS=N` or `OPERATOR=N`; UsageError if it is something else, or there is no such pass or operator."""
        name, _, count = (part.strip() for part in text.partition("="))
        if not name or not count.isdigit():
            raise UsageError(f"cannot read the expectation {text!r}", advice="write --expect fuse-attention=12")
        expectation = cls(name, int(count))
        if not expectation.counts_nodes:
            registry.pass_class(name)
        elif "::" not in name and not onnx.defs.has(name):
            operators = {schema.name for schema in onnx.defs.get_all_schemas()}
            raise UsageError(f"unknown operator {name!r}{did_you_mean(name, operators)}", where=f"--expect {text}")
        return expectation

    @property
    def counts_nodes(self) -> bool:
        """Whether this is about an operator: their names have capitals or, outside of ONNX's own, a domain."""
        return self.name[:1].isupper() or "::" in self.name

    @property
    def is_exact(self) -> bool:
        """Whether what is counted does not depend on a budget."""
        return not self.counts_nodes and registry.pass_class(self.name).exact

    def failure(self, rewritten: Rewritten) -> CheckFailed | None:
        """The error if there are more or fewer than expected; it names the first site that a pass refused."""
        advice = "planish explain lists every site"
        if self.counts_nodes:
            present = rewritten.operators.get(self.name, 0)
            if present == self.count:
                return None
            what = f"passes left {present} nodes {self.name}, {self.count} were expected"
            return CheckFailed(what, advice=advice)
        sites_of_pass = [sites for sites in rewritten.sites if sites.name == self.name]
        fired = sum(len(sites.fired) for sites in sites_of_pass if sites.rolled_back is None)
        if fired == self.count:
            return None
        refusals = [refusal for sites in sites_of_pass for refusal in sites.refusals]
        undone = [f"it was undone: {sites.rolled_back}" for sites in sites_of_pass if sites.rolled_back is not None]
        reasons = undone or [f"{refusal.site}: {refusal.reason} ({refusal.culprit})" for refusal in refusals[:1]]
        why = "" if sites_of_pass else "; no pipeline has that pass"
        what = f"{self.name} fired at {fired} sites, {self.count} were expected{why}"
        return CheckFailed(what + "".join(f"; {reason}" for reason in reasons), advice=advice)


def check_expectations(wanted: Iterable[Expectation], alternatives: Sequence[Rewritten]) -> None:
    """CheckFailed if one expectation holds in none of the ``alternatives`` for a target; it tells of the first."""
    for expectation in wanted:
        failures = [expectation.failure(rewritten) for rewritten in alternatives]
        if failures and None not in failures:
            raise next(failure for failure in failures if failure is not None)


def refuse_absent(wanted: Iterable[Expectation], passes: Mapping[str, Iterable[Pass]]) -> None:
    """UsageError if a pass must fire that is in no pipeline of a target; ``passes`` are those of each target."""
    for target, steps in passes.items():
        names = {step.name for step in steps}
        for expectation in wanted:
            if expectation.count and not expectation.counts_nodes and expectation.name not in names:
                raise UsageError(
                    f"no pipeline of {target} has that pass{did_you_mean(expectation.name, names)}",
                    where=f"--expect {expectation.name}={expectation.count}",
                )
