"""What a study consists of: targets, candidates and seeds, and the cells that they make.

A cell is an ordinary training: a fold of a dataset, with plans of its own. The study's folder has an
``nnUNet_preprocessed`` of its own, whose datasets are links to the user's and have the study's folds: the fold of each
number of cases and seed trains on that many cases and validates on the test cases, which no training and no ranking
sees. With more cases a fold has those of the smaller ones, too.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from stunet.environment import find_plans, nnunet_folder
from stunet.errors import CheckpointError, DatasetError, UsageError, reading
from stunet.evaluation import choose_cases
from stunet.files import Name, decode, read_document, read_json, write_json
from stunet.labels.annotations import MANIFEST_NAME
from stunet.network import find_size
from stunet.planning.preprocessed import PreprocessedDataset, open_preprocessed
from stunet.ranking.ranking import DEFAULT_METRICS, METRICS, find_checkpoints, read_zoo
from stunet.settings import Strategy, check_settings
from stunet.sizes import N_STAGES, STUNetSize
from stunet.weights.convert import SourceWeights, locate_checkpoint, open_any_weights
from stunet.weights.transfer import HEADS

SCRATCH = "scratch"
"""Candidate without weights."""
FORMAT = 1
_Count = Annotated[int, msgspec.Meta(ge=1)]


class TargetForm(msgspec.Struct, forbid_unknown_fields=True):
    """A dataset to fine-tune on."""

    dataset: int | str
    cases: Annotated[list[_Count], msgspec.Meta(min_length=1)]  # numbers of labelled cases
    test: _Count  # number of cases that all are scored on
    configuration: str = "3d_fullres"
    plans: str = "nnUNetPlans"
    groups: str | None = None  # JSON of lists of cases by group, or a pattern that finds the group in a case's name
    settings: dict[str, Any] = {}  # beside those of the study, such as patch_size


class CandidateForm(msgspec.Struct, forbid_unknown_fields=True):
    """Weights to start from, or several in a zoo file; without either, a training from scratch."""

    name: Name | None = None
    path: Name | None = None
    zoo: Name | None = None
    strategies: Annotated[tuple[Strategy, ...], msgspec.Meta(min_length=1)] = ("full",)
    size: Name | None = None  # of a training from scratch: small, base, large, huge
    depth: list[int] | None = None  # or blocks of each stage,
    width: _Count | None = None  # and channels of the first one
    sources: list[int | str] = []  # datasets that it was trained on, on which it is not compared
    facts: dict[Name, float] = {}  # numbers that might tell its worth, such as its training cases
    settings: dict[str, Any] = {}  # beside those of the study


class StudyForm(msgspec.Struct, forbid_unknown_fields=True):
    """``study.yaml``."""

    targets: Annotated[list[TargetForm], msgspec.Meta(min_length=1)]
    candidates: Annotated[list[CandidateForm], msgspec.Meta(min_length=1)]
    seeds: _Count = 1
    settings: dict[str, Any] = {}
    metrics: tuple[Name, ...] = DEFAULT_METRICS
    keep_checkpoints: bool = False


@dataclass(frozen=True)
class Candidate:
    """Weights, or none, with all that its trainings need."""

    name: str
    path: str | None
    strategies: tuple[str, ...]
    size: STUNetSize
    facts: Mapping[str, float]
    settings: Mapping[str, Any]
    not_on: tuple[str, ...]  # datasets that it was trained on


@dataclass(frozen=True)
class Target:
    """A dataset with its test cases, and the order in which each seed takes the others for training."""

    dataset: str
    configuration: str
    plans: str
    n_cases: tuple[int, ...]
    test: tuple[str, ...]
    orders: tuple[tuple[str, ...], ...]
    settings: Mapping[str, Any]

    def fold(self, n_cases: int, seed: int) -> int:
        """Return the number of the fold that trains on so many cases, drawn by this seed."""
        return self.n_cases.index(n_cases) * len(self.orders) + seed

    @property
    def folds(self) -> list[dict[str, list[str]]]:
        """Return them as nnU-Net's ``splits_final.json`` has them."""
        return [{"train": list(o[:n]), "val": list(self.test)} for n in self.n_cases for o in self.orders]


@dataclass(frozen=True)
class Cell:
    """One training, or, without a strategy, the ranking of all candidates by the cases of one fold."""

    target: Target
    n_cases: int
    seed: int
    candidate: Candidate | None = None
    strategy: str | None = None

    @property
    def fold(self) -> int:
        """Number of its fold."""
        return self.target.fold(self.n_cases, self.seed)

    @property
    def plans(self) -> str:
        """Name of its plans."""
        return "S_" + ("ranking" if self.candidate is None else f"{_slug(self.candidate.name)}-{self.strategy}")

    @property
    def name(self) -> str:
        """Where its results are, within the study."""
        what = "ranking" if self.candidate is None else self.plans
        return f"{self.target.dataset}/{what}/cases_{self.n_cases}_seed_{self.seed}"


class Study:
    """A study's folder, as :func:`plan_study` has made it.

    Raises:
        UsageError: There is none, or it is not whole.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        remedy = "plan it with stunet study plan study.yaml -o FOLDER"
        with reading(self.folder / "study.json", "no study that can be read", UsageError, remedy):
            self.content = read_json(self.folder / "study.json")
            if self.content["format"] != FORMAT:
                raise ValueError(f"format {self.content['format']} instead of {FORMAT}")
            self.targets = msgspec.convert(self.content["targets"], tuple[Target, ...])
            self.candidates = msgspec.convert(self.content["candidates"], tuple[Candidate, ...])
            self.seeds, self.metrics = int(self.content["seeds"]), list(self.content["metrics"])
            self.settings, self.keep_checkpoints = self.content["settings"], bool(self.content["keep_checkpoints"])

    @cached_property
    def trainings(self) -> list[Cell]:
        """All trainings; those of the first seed first, so that an early report is about all candidates."""
        return list(self._trainings())

    def _trainings(self) -> Iterator[Cell]:
        for seed in range(self.seeds):
            for target in self.targets:
                for n in target.n_cases:
                    for candidate in self.candidates:
                        if target.dataset not in candidate.not_on:
                            yield from (Cell(target, n, seed, candidate, each) for each in candidate.strategies)

    @cached_property
    def rankings(self) -> list[Cell]:
        """Rankings by the labelled cases of each fold, where there is anything to rank; one case is too few."""
        targets = [target for target in self.targets if self.metrics and self.zoo(target)]
        return [Cell(t, n, seed) for seed in range(self.seeds) for t in targets for n in t.n_cases if n > 1]

    def zoo(self, target: Target) -> dict[str, str]:
        """Checkpoints to be ranked for a target, with the name of the first candidate that begins with each."""
        names: dict[str, str] = {}
        for candidate in self.candidates:
            if candidate.path is not None and target.dataset not in candidate.not_on:
                names.setdefault(candidate.path, candidate.name)
        return names

    @property
    def cells(self) -> list[Cell]:
        """All that is to be done."""
        return [*self.rankings, *self.trainings]

    def settings_of(self, target: Target, candidate: Candidate | None) -> dict[str, Any]:
        """Return the settings of a training, or a ranking: the study's, then the target's, then the candidate's.

        From scratch heads begin at 0, as those of new structures do in fine-tuning, unless one of these says otherwise.
        """
        fair = {"head": "fresh"} if candidate is not None and candidate.path is None else {}
        return {**fair, **self.settings, **target.settings, **({} if candidate is None else candidate.settings)}

    def result(self, cell: Cell) -> Path:
        """Return where the result of a cell is or will be."""
        return self.folder / "results" / f"{cell.name}.json"


def plan_study(definition: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Study:
    """Check all that a study needs, and make its folder; nothing is trained.

    Args:
        definition: ``study.yaml``; paths in it are relative to it.
        folder: The study's folder. One that holds the same study is left as it is.

    Raises:
        UsageError: A definition that cannot be used, or a folder that holds another study.
        DatasetError: A target is not preprocessed, or has too few cases.
        CheckpointError: A candidate cannot be read, or does not fit a target.
    """
    definition, folder = Path(definition), Path(folder)
    with reading(definition, "a study that cannot be used", UsageError, "correct it"):
        form = decode(read_document(definition), StudyForm)
    _check_settings(form.settings, str(definition))
    if unknown := [name for name in form.metrics if name not in METRICS]:
        raise UsageError(f"{definition} has the metrics {', '.join(unknown)}: take some of {', '.join(METRICS)}")
    opened = {str(t.dataset): open_preprocessed(str(t.dataset), t.plans, t.configuration) for t in form.targets}
    targets = [_target(t, opened[str(t.dataset)], definition.parent, form.seeds) for t in form.targets]
    if twice := sorted({t.dataset for t in targets if [o.dataset for o in targets].count(t.dataset) > 1}):
        raise UsageError(
            f"{definition} has the target {', '.join(twice)} twice: give all numbers of cases in one entry"
        )
    names = {key: d.name for d in opened.values() for key in (d.name, d.name[7:10], str(int(d.name[7:10])))}
    candidates = list(_candidates(form, definition, [*opened.values()], names))
    content = {
        "format": FORMAT, "targets": targets, "candidates": candidates, "seeds": form.seeds, "settings": form.settings,
        "metrics": form.metrics, "keep_checkpoints": form.keep_checkpoints,
    }  # fmt: skip
    content = json.loads(msgspec.json.encode(content))
    path = folder / "study.json"
    if path.is_file():
        if difference := _difference(Study(folder).content, content):
            raise UsageError(f"{folder} holds another study: {difference}; give another folder with -o")
        return Study(folder)
    for target, dataset in zip(targets, opened.values(), strict=True):
        _link(target, dataset, folder)
    write_json(content, path)
    study = Study(folder)
    for target in study.targets:
        zoo = [{"name": name, "path": each} for each, name in study.zoo(target).items()]
        write_json({"checkpoints": zoo}, folder / f"zoo_{target.dataset}.json")
    return study


def _target(form: TargetForm, dataset: PreprocessedDataset, place: Path, seeds: int) -> Target:
    groups = _groups(form.groups, dataset.cases, place)
    test, orders = split_cases(groups, form.test, seeds)
    if (left := len(orders[0])) < max(form.cases) or len(test) < form.test:
        got = f"{dataset.name} has {len(dataset.cases)} cases: {len(test)} of {form.test} for testing leave {left}"
        raise DatasetError(f"{got}, and {max(form.cases)} are to be trained on: lower cases or test")
    wanted = tuple(sorted(set(form.cases)))
    _check_settings(form.settings, f"settings of {dataset.name}")
    choose_cases(dataset.name, "train", None, test)  # raw labels, which predictions will be scored on
    orders = tuple(order[: wanted[-1]] for order in orders)
    return Target(dataset.name, form.configuration, form.plans, wanted, test, orders, form.settings)


def _groups(given: str | None, cases: Sequence[str], place: Path) -> list[list[str]]:
    """Cases that stay together, by the file or the pattern that says which."""
    names = {case: case for case in cases}
    if given is not None and given.endswith(".json"):
        with reading(place / given, "groups that cannot be used", UsageError, "write lists of cases by group"):
            listed = msgspec.convert(read_json(place / given), dict[str, list[str]])
            pairs = [(case, f"group {group}") for group, members in listed.items() for case in members]
            if twice := sorted({case for case, _ in pairs if [c for c, _ in pairs].count(case) > 1}):
                raise UsageError(f"{place / given} has {', '.join(twice[:5])} in two groups: leave it in one")
            if not any(case in names for case, _ in pairs):
                got = f"{place / given} names {', '.join(case for case, _ in pairs[:3])}, and no case of the dataset"
                raise UsageError(f"{got}: write cases as {', '.join(cases[:3])}")
            names |= {case: group for case, group in pairs if case in names}
    elif given is not None:
        try:
            matches = {case: re.search(given, case) for case in cases}
        except re.error as error:
            raise UsageError(f"groups: {given} is no regular expression ({error}): correct it") from None
        if lacking := [case for case, match in matches.items() if match is None]:
            raise UsageError(f"groups: {given} does not match {', '.join(lacking[:5])}: write one that matches all")
        names = {case: match.group(match.re.groups and 1) for case, match in matches.items() if match}
    found: dict[str, list[str]] = {}
    for case, group in names.items():
        found.setdefault(group, []).append(case)
    return list(found.values())


def split_cases(
    groups: Sequence[Sequence[str]], n_test: int, seeds: int
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Draw test cases, and for each seed an order of the others, of which a training takes the first.

    >>> split_cases([["a"], ["b1", "b2"], ["c"]], 1, 2)
    (('c',), (('b1', 'a', 'b2'), ('b2', 'a', 'b1')))

    Args:
        groups: Cases of which none is tested on while others are trained on, such as two scans of one person.
        n_test: Number of test cases; there are fewer where groups do not allow so many.
        seeds: Number of orders.
    """
    test: list[str] = []
    rest: list[str] = []
    for i in np.random.default_rng(0).permutation(len(groups)):
        if len(test) + len(groups[i]) <= n_test:
            test += groups[i]
        else:
            rest += groups[i]
    drawn = [np.random.default_rng(1 + seed).permutation(len(rest)) for seed in range(seeds)]
    return tuple(test), tuple(tuple(rest[i] for i in order) for order in drawn)


def _candidates(
    form: StudyForm, definition: Path, datasets: list[PreprocessedDataset], names: Mapping[str, str]
) -> Iterator[Candidate]:
    listed: list[tuple[str, Path | None, CandidateForm]] = []
    for each in form.candidates:
        if each.zoo is not None:
            listed += [(name, path, each) for name, path in read_zoo(definition.parent / each.zoo).items()]
        elif each.path is None:
            listed.append((each.name or SCRATCH, None, each))
        else:
            local = definition.parent / Path(each.path).expanduser()
            (found,) = find_checkpoints([local if local.exists() else each.path])
            listed.append((each.name or found.stem, found.absolute(), each))
    plans = [_slug(name) for name, _, _ in listed]
    if alike := sorted({name for (name, _, _), own in zip(listed, plans, strict=True) if plans.count(own) > 1}):
        got = f"{definition} has candidates whose names are the same or differ in signs alone: {', '.join(alike)}"
        raise UsageError(f"{got}; give each a name of its own")
    sizes: list[STUNetSize] = []
    made = []
    for name, path, each in sorted(listed, key=lambda entry: entry[1] is None):  # scratch takes the others' size
        _check_candidate(each, f"{definition}, {name}")
        facts = dict(each.facts)
        if path is not None:
            weights = open_any_weights(path)
            if not isinstance(weights, SourceWeights):
                raise CheckpointError(
                    f"{name} is a {weights.architecture.name}, no STU-Net: stunet rank alone takes it"
                )
            for dataset in datasets:
                if weights.architecture.n_axes != (axes := len(dataset.configuration["patch_size"])):
                    got = f"{name} has {weights.architecture.n_axes}D weights, {dataset.name} {axes}D patches"
                    raise CheckpointError(f"{got}: choose another configuration, or leave one of them out")
            size = weights.architecture.size
            body = (t.numel() for key, t in weights.tensors.items() if not key.startswith(HEADS))
            facts = {"parameters": float(sum(body)), **facts}
            if weights.pretext is None:  # a task without labels logs its own measure there
                facts = {**_source_dice(path), **facts}
        elif each.width is not None:
            size = STUNetSize("custom", tuple(each.depth or (1,) * N_STAGES), each.width)
        elif each.size is None and len(set(sizes)) == 1:
            size = sizes[0]
        elif each.size is None and sizes:
            raise UsageError(f"{definition}: {name} has no size, and the candidates have several: give size, or width")
        else:
            size = find_size(each.size or "base")
        sizes += [size] * (path is not None)
        not_on = tuple(sorted({names[str(source)] for source in each.sources if str(source) in names}))
        strategies, start = tuple(dict.fromkeys(each.strategies)), None if path is None else str(path)
        made.append(Candidate(name, start, strategies, size, facts, each.settings, not_on))
    order = [name for name, _, _ in listed]
    return iter(sorted(made, key=lambda candidate: order.index(candidate.name)))


def _check_settings(settings: Mapping[str, Any], source: str) -> None:
    check_settings(settings, source=source)
    if settings.get("final_validation") is False:
        raise UsageError(f"{source} has final_validation=false, and its predictions are scored: leave it out")


def _slug(name: str) -> str:
    """A name as it stands in those of plans and folders."""
    return re.sub(r"[^\w.-]+", "-", name)


def _check_candidate(form: CandidateForm, source: str) -> None:
    """Refuse what would be left out in silence."""
    _check_settings(form.settings, source)
    sizes = [name for name in ("size", "depth", "width") if getattr(form, name) is not None]
    if sizes and (form.path or form.zoo):
        raise UsageError(f"{source}: {' and '.join(sizes)} beside weights, which have a size: leave it out")
    if sizes not in ([], ["size"], ["width"], ["depth", "width"]):
        raise UsageError(f"{source}: {' and '.join(sizes)}: give size, or width, or width and depth")
    if form.path is None and form.zoo is None and set(form.strategies) != {"full"}:
        raise UsageError(f"{source}: strategies {', '.join(form.strategies)} without weights: leave them out")
    if bad := [f"{name}: {value}" for name, value in form.facts.items() if not math.isfinite(value)]:
        raise UsageError(f"{source}: facts that are not finite, {', '.join(bad)}: leave them out")


def _source_dice(path: Path) -> dict[str, float]:
    """What nnU-Net has logged on cases of the dataset that weights are from."""
    from stunet.weights.read import read_checkpoint

    try:
        logged = read_checkpoint(locate_checkpoint(path))["logging"]["ema_fg_dice"]
        value = float(logged[-1])
        return {"pseudo Dice at the source": value} if math.isfinite(value) else {}
    except (CheckpointError, LookupError, TypeError, ValueError):
        return {}


def _difference(old: Any, new: Any, place: str = "") -> str:
    """Say where two contents of JSON first differ, or nothing."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new})}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = {str(i): pair for i, pair in enumerate(zip(old, new, strict=True))}
    else:
        return "" if old == new else f"{place or 'all'} is {str(old)[:80]} there and {str(new)[:80]} here"
    found = (_difference(*pair, f"{place}.{key}".removeprefix(".")) for key, pair in pairs.items())
    return next(filter(None, found), "")


def _link(target: Target, dataset: PreprocessedDataset, folder: Path) -> None:
    """Give the study a dataset that consists of links to the user's, and has the study's folds."""
    own = nnunet_folder("nnUNet_preprocessed") / target.dataset
    mirror = folder / "nnUNet_preprocessed" / target.dataset
    mirror.mkdir(parents=True, exist_ok=True)
    plans = find_plans(target.dataset, target.plans)
    data = str(dataset.configuration["data_identifier"])
    for name in ("dataset.json", "dataset_fingerprint.json", "gt_segmentations", MANIFEST_NAME, plans.name, data):
        if (own / name).exists() and not (mirror / name).is_symlink():
            (mirror / name).symlink_to((own / name).resolve())
    (folder / "nnUNet_results").mkdir(exist_ok=True)
    write_json(target.folds, mirror / "splits_final.json")
