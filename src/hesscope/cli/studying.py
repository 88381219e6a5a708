"""The verbs that study: approximations, diagonal-study, convergence, perplexity-study, cross-check."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hesscope.cli.options import CommonOptions
from hesscope.cli.resuming import checkpoint
from hesscope.cli.running import finish, make_operator, make_problem, make_space, operator_of, output_folder
from hesscope.errors import HesscopeError


def run_diagonal_study(
    common: CommonOptions,
    method: list[str] | None,
    budget: list[int] | None,
    seeds: int,
    exact: Path | None,
    reference: list[Path] | None,
) -> None:
    """`hesscope diagonal-study`."""
    import hesscope as hs
    from hesscope.cli.showing import load_kind
    from hesscope.results import Diagonal

    folder = output_folder(common, "diagonal-study")
    given = {name: value for name, value in (("methods", method), ("budgets", budget)) if value}
    truth = None if exact is None else load_kind(exact, Diagonal)
    others = {path.name: load_kind(path, Diagonal) for path in reference or ()}
    kept = checkpoint(common, folder)
    result = hs.diagonal_study(make_operator(common), exact=truth, seeds=seeds, seed=common.seed, references=others,
                               checkpoint=kept, **given)  # type: ignore[arg-type]  # fmt: skip
    own = {"method": method, "budget": budget, "seeds": seeds, "exact": exact, "reference": reference}
    finish(result, common, folder, kept, **own)


def run_convergence(common: CommonOptions, keep: str) -> None:
    """`hesscope convergence`."""
    import hesscope as hs

    folder = output_folder(common, "convergence")
    wanted = _numbers(keep)
    problem = make_problem(common)
    space = make_space(common, problem)
    result = hs.convergence(problem, space, operator=common.operator, engine=common.engine, keep=wanted)
    finish(result, common, folder, keep=keep)


def run_perplexity_study(common: CommonOptions) -> None:
    """`hesscope perplexity-study`."""
    import hesscope as hs

    folder = output_folder(common, "perplexity-study")
    _require_hessian(common, "perplexity-study")
    problem = make_problem(common)
    finish(hs.perplexity_study(problem, make_space(common, problem)), common, folder)


def run_cross_check(common: CommonOptions, columns: int, entries: int, block: Path | None) -> bool:
    """`hesscope cross-check`; whether all checks passed."""
    import hesscope as hs

    folder = output_folder(common, "cross-check")
    _require_hessian(common, "cross-check")
    given = None if block is None else hs.load(block)
    problem = make_problem(common)
    space = make_space(common, problem)
    result = hs.cross_check(problem, space, columns=columns, entries=entries, block=given, seed=common.seed)
    finish(result, common, folder, columns=columns, entries=entries, block=block)
    return result.passed


def run_approximations(common: CommonOptions, kinds: str | None, exact: Path | None) -> None:
    """`hesscope approximations`. --samples and --per belong to the label sets of what is compared, and to a Fisher operator."""
    import hesscope as hs
    from hesscope.cli.showing import load_kind
    from hesscope.results import Block

    folder = output_folder(common, "approximations")
    wanted = None if kinds is None else [name.strip() for name in kinds.split(",") if name.strip()]
    given = None if exact is None else load_kind(exact, Block)
    of_block = common if "fisher" in common.operator else dataclasses.replace(common, samples=None, per=None)
    kept = checkpoint(common, folder)
    result = hs.approximations(
        operator_of(of_block, make_problem(common)),
        wanted,
        samples=common.samples or 1,
        per=common.per or "token",
        seed=common.seed,
        exact=given,
        checkpoint=kept,
    )
    finish(result, common, folder, kept, kinds=kinds, exact=exact)


def _require_hessian(common: CommonOptions, verb: str) -> None:
    if common.operator != "hessian" or common.engine not in ("auto", "reverse-over-reverse"):
        raise HesscopeError(
            f"Expected the Hessian by double backward for {verb}, got --operator {common.operator} --engine {common.engine}; "
            "leave both out."
        )


def _numbers(keep: str) -> str | list[int]:
    """auto, all and none as they are; `1,2,4` as numbers."""
    if not all(part.strip().isdigit() for part in keep.split(",")):
        return keep
    return [int(part) for part in keep.split(",")]
