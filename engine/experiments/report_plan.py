"""The analyses in the report of a sweep: those of its recipe's `report` section, or a default.

    report:
      layer_scores: [JT, ALT, 2ST-MHA, ACL]
      ablation: {methods: {ACL: ACL, "no ACL-Grad": ACL without gate}}
      grid: [{option: aux_weight, methods: {ACL: ACL sweep, "CE+SCL": CE+SCL sweep}}]
      full_model: {methods: {CE: CE, "ACL-CL, exit 3": {method: ACL, layer: 3}}, metrics: all}
      claims:
        - {claim: ACL beats 2ST on shallow exits, better: ACL, than: 2ST-MHA, exits: shallow}
        - {claim: lambda matters less, better: ACL, than: CE+SCL, spread_over: aux_weight}

Printed names come before the names of methods in the recipe. `metrics: all` adds a column for every
metric of a task; by default, the table has the main one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.text import did_you_mean
from .recipe import check_keys, listed_options
from .results import grid_value

_KEYS = ("layer_scores", "ablation", "grid", "full_model", "claims")
_CLAIM_KEYS = ("claim", "better", "than", "exits", "spread_over")


@dataclass(frozen=True)
class Target:
    """A method of the recipe and the layer of an exit; None: the last exit."""

    method: str
    layer: int | None = None


@dataclass(frozen=True)
class GridPlan:
    """A table over the values of an option: printed name -> method with a list of values for it."""

    option: str
    methods: Mapping[str, Target]


@dataclass(frozen=True)
class ClaimPlan:
    """A claim that a method has a higher mean score than another, over all exits or the lower half.

    spread_over: an option for which both methods have a list of values; the claim is then that the
    scores of the first method spread less over the values.
    """

    text: str
    better: str
    than: str
    shallow: bool = False
    spread_over: str | None = None

    @property
    def measure(self) -> str:
        """The quantity that is compared, as a sentence."""
        exits = "the lower half of the exits" if self.shallow else "the exits"
        option = self.spread_over
        spread = f", its range (highest minus lowest) over the values of {option}" if option else ""
        return f"the mean score over {exits}{spread}."


@dataclass(frozen=True)
class ReportPlan:
    """Printed name -> method, for each kind of analysis; those that are empty are left out.

    The first method of the ablation is the one that others are compared with.
    """

    layer_scores: Mapping[str, Target]
    ablation: Mapping[str, Target]
    grids: tuple[GridPlan, ...]
    full_model: Mapping[str, Target]
    claims: tuple[ClaimPlan, ...] = ()
    all_metrics: bool = False


def plan_report(recipe: Mapping[str, Any]) -> ReportPlan:
    """The analyses that a recipe asks for; if it asks for none, all that its methods allow.

    Raises:
        ValueError: an unknown key or method, or a grid table of a method without that list.
    """
    methods = {str(name): dict(options or {}) for name, options in recipe["methods"].items()}
    lists = {name: listed_options(options) for name, options in methods.items()}
    asked = recipe.get("report")
    if asked is None:
        return _suitable(methods, lists)
    if not isinstance(asked, Mapping):
        raise ValueError(f"report: expected `analysis: …` lines, got {asked!r}.")
    check_keys(asked, _KEYS, "report")
    kinds = {"layer_scores": "methods", "grid": "tables", "claims": "claims"}
    named, grids, claims = (asked.get(key) or [] for key in kinds)
    if isinstance(named, list):
        named = {str(name): name for name in named}
    for (key, what), found in zip(kinds.items(), (named, grids, claims), strict=True):
        if not isinstance(found, Mapping if key == "layer_scores" else list):
            raise ValueError(f"report.{key}: expected a list of {what}, got {found!r}.")
    return ReportPlan(
        _targets(named, methods, "report.layer_scores") if named else {},
        _of_mapping(asked, "ablation", methods),
        tuple(_grid(table, methods, lists) for table in grids),
        _of_mapping(asked, "full_model", methods),
        tuple(_claim(claim, methods, lists) for claim in claims),
        all_metrics="metrics" in (asked.get("full_model") or ()),
    )


def _suitable(methods: Mapping[str, Any], lists: Mapping[str, list[str]]) -> ReportPlan:
    plain = {name: Target(name) for name in methods if not lists[name]}
    several = {name: target for name, target in plain.items() if methods[name].get("strategy")}
    grids: dict[str, dict[str, Target]] = {}
    for name, options in lists.items():
        for option in options:
            grids.setdefault(option, {})[name] = Target(name)
    return ReportPlan(several, {}, tuple(GridPlan(*grid) for grid in grids.items()), plain)


def _of_mapping(
    asked: Mapping[str, Any], key: str, methods: Mapping[str, Any]
) -> dict[str, Target]:
    section = asked.get(key)
    if section is None:
        return {}
    optional = {"metrics"} if key == "full_model" else set()
    if not isinstance(section, Mapping) or set(section) - optional != {"methods"}:
        raise ValueError(f"report.{key}: expected `methods: {{printed name: method}}`.")
    if section.get("metrics", "all") != "all":
        raise ValueError(
            f"report.{key}: metrics={section['metrics']!r}: write `all`, or leave it out."
        )
    return _targets(section["methods"], methods, f"report.{key}.methods")


def _grid(table: Any, methods: Mapping[str, Any], lists: Mapping[str, list[str]]) -> GridPlan:
    if not isinstance(table, Mapping) or set(table) != {"option", "methods"}:
        raise ValueError(f"report.grid: expected `option` and `methods`, got {table!r}.")
    option = str(table["option"])
    targets = _targets(table["methods"], methods, "report.grid.methods")
    for target in targets.values():
        if option not in lists[target.method]:
            raise ValueError(
                f"report.grid: method {target.method!r} has no list of values for {option!r}."
            )
    return GridPlan(option, targets)


def _claim(claim: Any, methods: Mapping[str, Any], lists: Mapping[str, list[str]]) -> ClaimPlan:
    if not isinstance(claim, Mapping) or not {"claim", "better", "than"} <= set(claim):
        raise ValueError(f"report.claims: expected `claim`, `better` and `than`, got {claim!r}.")
    check_keys(claim, _CLAIM_KEYS, "report.claims")
    exits = claim.get("exits", "all")
    if exits not in ("all", "shallow"):
        raise ValueError(f"report.claims: exits={exits!r} is neither 'all' nor 'shallow'.")
    sides = {key: str(claim[key]) for key in ("better", "than")}
    named = _targets(sides, methods, "report.claims")
    if sides["better"] == sides["than"]:
        raise ValueError(f"report.claims: {sides['better']!r} is compared with itself.")
    option = claim.get("spread_over")
    for target in named.values():
        listed = lists[target.method]
        if listed != ([] if option is None else [option]):
            wanted = f"a list of values for {option!r} and no other" if option else "no such list"
            raise ValueError(
                f"report.claims: method {target.method!r} gives lists of values to {listed}; a "
                f"claim with spread_over={option!r} needs {wanted}."
            )
    if option is not None:
        first, second = (methods[name][option] for name in sides.values())
        if Counter(map(grid_value, first)) != Counter(map(grid_value, second)):
            # More values tend to spread more.
            raise ValueError(
                f"report.claims: {option} has the values {first} in {sides['better']!r} and "
                f"{second} in {sides['than']!r}; a spread compares equal lists only."
            )
    return ClaimPlan(str(claim["claim"]), **sides, shallow=exits == "shallow", spread_over=option)


def _targets(named: Any, methods: Mapping[str, Any], where: str) -> dict[str, Target]:
    if not isinstance(named, Mapping) or not named:
        raise ValueError(f"{where}: expected `printed name: method` pairs, got {named!r}.")
    found = {}
    for label, value in named.items():
        place = f"{where}: {label}"
        given = value if isinstance(value, Mapping) else {"method": value}
        if "method" not in given or not set(given) <= {"method", "layer"}:
            raise ValueError(
                f"{place}: expected a method, or {{method: …, layer: …}}, got {value!r}."
            )
        method, layer = str(given["method"]), given.get("layer")
        if layer is not None and (type(layer) is not int or layer < 1):
            raise ValueError(f"{place}: layer={layer!r} is no layer; the first is 1.")
        if method not in methods:
            raise ValueError(
                f"{where}: {method!r} is no method of the recipe.{did_you_mean(method, methods)}"
            )
        found[str(label)] = Target(method, layer)
    return found
