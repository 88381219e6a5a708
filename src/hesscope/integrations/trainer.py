"""Curvature during training with the Trainer of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hesscope.algorithms.basis import Home
from hesscope.algorithms.eigs import Search, basis_capacity
from hesscope.algorithms.traces import Hutchinson
from hesscope.errors import HesscopeError, HesscopeWarning, RankLost
from hesscope.integrations.adam import left_out, preconditioned, require_adam
from hesscope.integrations.quiet import undisturbed
from hesscope.operators import PROBLEM_OPERATORS, Operator
from hesscope.problem import Problem, causal_lm, select
from hesscope.space import Vectors


class CurvatureCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the sharpness, the trace and, on request, the Adam-preconditioned sharpness while a `transformers.Trainer` runs.

    Every `every` steps, on the same probe batches: `curvature/sharpness`, the largest eigenvalue, with its measured
    `curvature/sharpness_residual` |H v - lambda v|; `curvature/trace` with `curvature/trace_standard_error`; and with
    `preconditioned=True` `curvature/preconditioned_sharpness`, that of D^(-1/2) H D^(-1/2) with D = sqrt(v_hat) + eps of
    Adam's state, its residual, and `curvature/preconditioned_left_out`, how many weights it leaves out since their v is 0:
    those that Adam has not moved. Each search starts from the eigenvectors of the time before. The numbers are those
    without dropout and, in mixed precision, without autocast. Training itself is not touched: its weights come out bit for bit as without the callback.

    `attach(trainer)` adds the callback and sends the numbers through the trainer's own log, so that they are in
    `trainer.state.log_history` and wherever the trainer reports to. A callback given to `Trainer(callbacks=[...])` only
    reaches the history.

    Args:
        data: the probe batches, anything that `hesscope.causal_lm` takes (with `options`, its keywords); or a function of
            the model that gives a problem, for any other loss.
        every: optimizer steps between two measurements.
        params: patterns of `hesscope.select`; every trainable parameter by default.
        operator: "hessian" or "ggn".
        k: eigenvalues to log; from the second on as `curvature/eigenvalue_2` and so forth.
        max_products, tol: of each search; it ends once every residual is at most tol |lambda|.
        trace_probes: sign vectors for the trace, the same every time; 0 leaves it out.
        preconditioned: needs Adam or AdamW.
        seed: of all random vectors.

    Raises:
        HesscopeError: a number out of range; when training begins: data or a model that make no problem, or an optimizer
            that is not Adam's kind. A measurement that fails later, or for which memory does not suffice, is a
            warning, on all ranks of several, and training goes on; it ends, on all of them, where the failure of one has
            left others waiting.
    """

    def __init__(
        self,
        data: Any,
        every: int = 100,
        params: Sequence[Any] = (),
        *,
        operator: str = "hessian",
        k: int = 1,
        max_products: int = 20,
        tol: float = 0.02,
        trace_probes: int = 10,
        preconditioned: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        _require(every, k, max_products, trace_probes, operator)
        self._data, self._options, self._params = data, options, (params,) if isinstance(params, str) else tuple(params)
        self.every, self._operator, self._k = every, operator, k
        self._products, self._tol, self._probes, self._seed = max_products, tol, trace_probes, seed
        self._preconditioned = preconditioned
        self._log: Callable[[dict[str, float]], None] | None = None
        self._H: Operator | None = None
        self._model: nn.Module | None = None
        self._vectors: dict[str, Vectors] = {}
        self._told_of_memory = False

    def attach(self, trainer: Any) -> CurvatureCallback:
        """Add the callback to a trainer, and log through it."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._log = trainer.log
        return self

    # ---- events of the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        """Make the operator; nothing is computed yet."""
        model = of_trainer["model"]
        with undisturbed(model):
            problem = self._problem(model)
            self._H = problem.comm.attempted(lambda: self._made(problem, model, of_trainer.get("optimizer")))
        self._model, self._vectors, self._told_of_memory = model, {}, False

    def on_step_end(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        """Measure and log, where it is time."""
        if state.global_step % self.every or self._H is None or self._model is None:
            return
        H, model, optimizer = self._H, self._model, of_trainer.get("optimizer")
        try:
            with undisturbed(model):
                found = H.comm.attempted(lambda: self._measure(H, model, optimizer))
        except RankLost:
            raise
        except (HesscopeError, torch.OutOfMemoryError) as error:
            self._vectors = {}  # a rank that came further than others has found new ones
            self._warn(state.global_step, error)
            return
        finally:
            release(H)
        if self._log is not None:
            # The trainer takes a call of `log` for the one that it has due at this step.
            due = control.should_log
            self._log(found)
            control.should_log = due
        else:
            state.log_history.append({**found, "epoch": state.epoch, "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        """Let go of the model."""
        self._H = self._model = None
        self._vectors = {}

    def _warn(self, step: int, error: Exception) -> None:
        """Say why a number is missing; of memory, which will lack again, only once."""
        if not isinstance(error, torch.OutOfMemoryError):
            warnings.warn(f"No curvature at step {step}: {error}", HesscopeWarning, stacklevel=3)
        elif not self._told_of_memory:
            self._told_of_memory = True
            warnings.warn(
                f"No curvature at step {step}, nor wherever memory runs out again: {error} Take fewer or smaller probe "
                "batches, or fewer parameters.", HesscopeWarning, stacklevel=3,
            )  # fmt: skip

    # ---- measuring

    def _problem(self, model: nn.Module) -> Problem:
        if callable(self._data):
            problem = self._data(model)
            if not isinstance(problem, Problem):
                raise HesscopeError(f"Expected the function to give a problem, got {type(problem).__name__}.")
            return problem
        return causal_lm(model, self._data, **self._options)

    def _made(self, problem: Problem, model: nn.Module, optimizer: Any) -> Operator:
        space = select(problem, *self._params)
        if self._preconditioned:
            require_adam(optimizer, model, space)
        return PROBLEM_OPERATORS[self._operator](problem, space)

    def _measure(self, H: Operator, model: nn.Module, optimizer: Any) -> dict[str, float]:
        products = H.products
        found = self._largest(H, "sharpness")
        if self._preconditioned:
            A = preconditioned(H, optimizer, model)
            found |= self._largest(A, "preconditioned_sharpness") | {"preconditioned_left_out": left_out(A)}
        if self._probes:
            estimator = Hutchinson(H, self._probes, None, self._seed)
            while not estimator.done:
                estimator.step()
            mean, error = estimator.estimate()
            found |= {"trace": mean, "trace_standard_error": error}
        found["products"] = H.products - products
        return {f"curvature/{name}": value for name, value in found.items()}

    def _largest(self, A: Operator, name: str) -> dict[str, float]:
        """The largest eigenvalues, from the vectors found last time."""
        k = min(self._k, A.space.size)
        home = Home()
        capacity = basis_capacity(A, k, None, home)
        search = Search(A, k, "LA", self._tol, self._products, capacity, self._seed, self._vectors.get(name), home)
        while not search.done:
            search.step()
        self._vectors[name] = search.vectors()
        found = {name: float(search.values[0]), f"{name}_residual": float(search.residuals[0])}
        prefix = "" if name == "sharpness" else "preconditioned_"
        for i in range(1, k):
            found |= {f"{prefix}eigenvalue_{i + 1}": float(search.values[i])}
            found |= {f"{prefix}eigenvalue_{i + 1}_residual": float(search.residuals[i])}
        return found


def release(H: Operator) -> None:
    """Drop graphs that the operator keeps: the next training step needs the memory, and changes the weights."""
    drop: Callable[[], None] | None = getattr(H, "release", None)
    if drop is not None:
        drop()


def _require(every: int, k: int, max_products: int, trace_probes: int, operator: str) -> None:
    if every < 1:
        raise HesscopeError(f"Expected every to be a number of steps, at least 1, got {every}.")
    if k < 1 or max_products < k:
        raise HesscopeError(f"Expected k of at least 1 and max_products of at least k, got {k} and {max_products}.")
    if trace_probes < 0 or trace_probes == 1:
        raise HesscopeError(
            f"Expected trace_probes of 0 or at least 2, for the error is their spread, got {trace_probes}."
        )
    if operator not in ("hessian", "ggn"):
        raise HesscopeError(f"Expected operator to be hessian or ggn, got {operator!r}.")
