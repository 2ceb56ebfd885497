"""Records of all sites: where each pass fired, refused (with the reason), or nearly matched.

They are stored in `sites.json`, so that `planish explain` needs neither the source nor the passes.
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
    """Rewritten sites: operator, name and module of each node."""
    refusals: Sequence[Refusal]
    """Refusals and near misses."""
    rolled_back: str | None = None
    """Reason for rolling the pass back."""

    @classmethod
    def of(cls, target: str, component: str, report: PassReport) -> PassSites:
        """The sites of a pass report."""
        return cls(target, component, report.text, tuple(report.sites), tuple(report.refusals), report.rolled_back)

    @classmethod
    def undone(cls, target: str, record: RolledBack) -> PassSites:
        """A pass that was rolled back, from the manifest."""
        return cls(target, record.component, record.text, (), (), record.reason)

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.text.partition("{")[0]

    @property
    def refused(self) -> list[Refusal]:
        """Sites where the pattern matched and a check failed."""
        return [refusal for refusal in self.refusals if not refusal.near]

    @property
    def near_misses(self) -> list[Refusal]:
        """Sites where only the core of the pattern matched."""
        return [refusal for refusal in self.refusals if refusal.near]


_RECORDS = TypeAdapter(list[PassSites])


def write_sites(folder: Path, records: Sequence[PassSites]) -> None:
    """Write `sites.json` without rolled back passes, since a build from a lock does not run them."""
    kept = [sites for sites in records if sites.rolled_back is None]
    (folder / SITES).write_bytes(_RECORDS.dump_json(kept, indent=1) + b"\n")


def of_pass(records: Sequence[PassSites], name: str) -> list[PassSites]:
    """The sites of one pass; UsageError if it is in no pipeline."""
    names = list(dict.fromkeys(sites.name for sites in records))
    if name not in names:
        raise UsageError(f"{name!r} is in no pipeline here{did_you_mean(name, names)}", where="--pass")
    return [sites for sites in records if sites.name == name]


def read_sites(folder: Path) -> list[PassSites]:
    """The records in `sites.json` of an output, and the passes that were rolled back; BadInput for other folders."""
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
    """Results of the passes of a target: the sites of every pass, and the operator counts."""

    sites: Sequence[PassSites]
    operators: Mapping[str, int]
    """Number of nodes by operator over all components, before legalization."""
    shipped: Mapping[str, int]
    """Number of nodes by operator of the graph that the target compiles."""

    @classmethod
    def of(cls, target: str, outcomes: Mapping[str, Outcome]) -> Rewritten:
        """The results of pipelines, by component."""
        sites = [PassSites.of(target, name, report) for name, one in outcomes.items() for report in one.reports]
        # Counted over all components: an expectation is about the whole target.
        canonical = summed(outcome.canonical for outcome in outcomes.values())
        return cls(sites, canonical, summed(operators_of(outcome.model) for outcome in outcomes.values()))


def summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of counts by name."""
    return dict(sorted(sum(map(Counter, counts), Counter[str]()).items()))


@dataclass(frozen=True)
class Expectation:
    """Expected number of sites of a pass (`fuse-attention=12`), or of nodes of an operator before legalization
    (`Attention=12`), over all components of a target."""

    name: str
    count: int

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """Read `PASS=N` or `OPERATOR=N`; UsageError for other texts, and for unknown passes and operators."""
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
        """True for an operator: its name has capitals or, outside of the standard, a domain."""
        return self.name[:1].isupper() or "::" in self.name

    @property
    def is_exact(self) -> bool:
        """True if the count does not depend on an accuracy budget."""
        return not self.counts_nodes and registry.pass_class(self.name).exact

    def failure(self, rewritten: Rewritten) -> CheckFailed | None:
        """The error if the count differs from the expected one, with the first refusal of the pass."""
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
        # A rolled back pass has no sites in the engine, whatever it rewrote before.
        undone = [f"it was undone: {sites.rolled_back}" for sites in sites_of_pass if sites.rolled_back is not None]
        reasons = undone or [f"{refusal.site}: {refusal.reason} ({refusal.culprit})" for refusal in refusals[:1]]
        why = "" if sites_of_pass else "; no pipeline has that pass"
        what = f"{self.name} fired at {fired} sites, {self.count} were expected{why}"
        return CheckFailed(what + "".join(f"; {reason}" for reason in reasons), advice=advice)


def check_expectations(wanted: Iterable[Expectation], alternatives: Sequence[Rewritten]) -> None:
    """Raise CheckFailed if an expectation fails in all ``alternatives`` of a target, with the failure of the first."""
    for expectation in wanted:
        failures = [expectation.failure(rewritten) for rewritten in alternatives]
        # Plain and optimized candidates are alternatives: the expectation may hold in either.
        if failures and None not in failures:
            raise next(failure for failure in failures if failure is not None)


def refuse_absent(wanted: Iterable[Expectation], passes: Mapping[str, Iterable[Pass]]) -> None:
    """Raise UsageError for an expected pass that is in no pipeline of a target; ``passes`` are the passes by target."""
    for target, steps in passes.items():
        names = {step.name for step in steps}
        for expectation in wanted:
            if expectation.count and not expectation.counts_nodes and expectation.name not in names:
                raise UsageError(
                    f"no pipeline of {target} has that pass{did_you_mean(expectation.name, names)}",
                    where=f"--expect {expectation.name}={expectation.count}",
                )
