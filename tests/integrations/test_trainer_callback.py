"""Curvature in a Trainer: the numbers, where they are logged, and training that does not notice."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import hesscope as hs
from hesscope.integrations.adam import left_out, preconditioned, require_adam
from hesscope.integrations.quiet import undisturbed

pytest.importorskip(
    "accelerate", reason="the Trainer of transformers needs accelerate: pip install 'hesscope[trainer]'"
)

VOCABULARY, LENGTH = 23, 8


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Warnings of the Trainer and of accelerate about this machine are none of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)
        yield


def model() -> GPT2LMHeadModel:
    """Two blocks with dropout everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, bos_token_id=1,
                            eos_token_id=2, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)  # fmt: skip
        return GPT2LMHeadModel(config)


def tokens(seed: int, count: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def train(folder: Path, callbacks: list[Any] = (), *, attach: Any = None, **more: Any) -> Trainer:  # type: ignore[assignment]
    """Seven steps on shuffled data."""
    settings = {"per_device_train_batch_size": 4, "max_steps": 7, "learning_rate": 3e-3, "seed": 3, "report_to": "none",
                "save_strategy": "no", "logging_steps": 2, "disable_tqdm": True, "use_cpu": True, **more}  # fmt: skip
    arguments = TrainingArguments(str(folder), **settings)
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(1, 24)]
    trainer = Trainer(model(), arguments, train_dataset=data, callbacks=list(callbacks))
    if attach is not None:
        attach.attach(trainer)
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


def callback(**more: Any) -> hs.CurvatureCallback:
    return hs.CurvatureCallback(tokens(2, 3), every=2, batch_size=2, **{"max_products": 6, "trace_probes": 2} | more)


def assert_same(one: Trainer, other: Trainer) -> None:
    a, b = weights(one), weights(other)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    losses = ([x["loss"] for x in t.state.log_history if "loss" in x] for t in (one, other))
    assert next(losses) == next(losses)


class EndOfTraining(TrainerCallback):
    """What a further step would draw."""

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.next = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("attached", [True, False])
def test_training_is_bit_identical(accumulation: int, attached: bool, tmp_path: Path, capsys: Any) -> None:
    ends = [EndOfTraining(), EndOfTraining()]
    more = {"gradient_accumulation_steps": accumulation}
    plain = train(tmp_path, [ends[0]], **more)
    own = callback(preconditioned=True)
    watched = train(tmp_path, [ends[1]] if attached else [ends[1], own], attach=own if attached else None, **more)
    assert_same(watched, plain)
    assert ends[0].next == ends[1].next
    logged = [x for x in watched.state.log_history if "curvature/sharpness" in x]
    assert [x["step"] for x in logged] == [2, 4, 6]


class Drawing:
    """A loss that draws from every source of random numbers."""

    def total(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        logits = model(**batch).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum"), batch["input_ids"][:, 1:].numel()  # fmt: skip


def test_random_states_return_even_if_the_loss_draws(tmp_path: Path) -> None:
    own = hs.CurvatureCallback(lambda m: hs.Problem(m, Drawing(), [{"input_ids": tokens(2, 2)}]), every=2, max_products=3, trace_probes=2)  # fmt: skip
    ends = [EndOfTraining(), EndOfTraining()]
    plain, watched = train(tmp_path, [ends[0]]), train(tmp_path, [ends[1]], attach=own)
    assert_same(watched, plain)
    assert ends[0].next == ends[1].next


def test_gradients_flags_and_modes_are_untouched() -> None:
    net = model().train()
    net.transformer.h[0].attn.eval()
    net.transformer.wpe.weight.requires_grad_(False)
    net(input_ids=tokens(5, 2), labels=tokens(5, 2)).loss.backward()
    before = {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    own = callback()
    state = type("State", (), {"global_step": 2, "epoch": 0.5, "log_history": []})
    own.on_train_begin(None, state, None, model=net)
    own.on_step_end(None, state, None, model=net)
    assert [m.training for m in net.modules()] == modes
    for name, p in net.named_parameters():
        flag, grad = before[name]
        assert p.requires_grad == flag
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert len(state.log_history) == 1


# ---- the numbers


class Snapshot(TrainerCallback):
    """Weights and Adam's state after every step."""

    def __init__(self) -> None:
        self.weights: dict[int, Any] = {}
        self.scales: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self.weights[state.global_step] = {n: t.clone() for n, t in of["model"].state_dict().items()}
        self.scales[state.global_step] = {}
        for name, p in of["model"].named_parameters():
            own = of["optimizer"].state[p]
            v = own["exp_avg_sq"].double() / (1 - 0.999 ** int(own["step"]))
            self.scales[state.global_step][name] = (v.sqrt() + 1e-8).flatten()


def test_the_numbers_are_those_of_the_model_at_that_step(tmp_path: Path) -> None:
    params = "transformer.h.1.mlp.c_proj.*"
    own = callback(preconditioned=True, k=2, max_products=90, tol=1e-4, trace_probes=4, params=params)
    snapshot = Snapshot()
    watched = train(tmp_path, [snapshot], attach=own, max_steps=4)
    logged = {x["step"]: x for x in watched.state.log_history if "curvature/sharpness" in x}
    assert set(logged) == {2, 4}
    for step, found in logged.items():
        net = model().eval()
        net.load_state_dict(snapshot.weights[step])
        problem = hs.causal_lm(net, tokens(2, 3), batch_size=2)
        H = hs.hessian(problem, hs.select(problem, params))
        pairs = hs.eigs(H, k=2, which="LA", tol=1e-5)
        expected = [found["curvature/sharpness"], found["curvature/eigenvalue_2"]]
        assert pairs.eigenvalues.tolist() == pytest.approx(expected, rel=1e-3)
        assert found["curvature/sharpness_residual"] <= 1e-4 * found["curvature/sharpness"]
        trace = hs.trace(H, "hutchinson", budget=4)
        assert found["curvature/trace"] == pytest.approx(trace.estimate, rel=1e-3)
        assert found["curvature/trace_standard_error"] == pytest.approx(trace.standard_error, rel=1e-2)
        S = torch.cat([snapshot.scales[step][name] for name in H.space.names]).rsqrt()
        A = hs.operator(H.to_dense().double() * torch.outer(S, S))
        sharp = hs.eigs(A, k=1, which="LA", tol=1e-4).eigenvalues
        assert found["curvature/preconditioned_sharpness"] == pytest.approx(float(sharp), rel=1e-2)


def test_under_mixed_precision_the_numbers_are_those_of_the_weights_own_precision(tmp_path: Path) -> None:
    own = callback(max_products=60, tol=1e-4, trace_probes=0)
    snapshot = Snapshot()
    watched = train(tmp_path, [snapshot], attach=own, max_steps=2, bf16=True)
    assert_same(watched, train(tmp_path, max_steps=2, bf16=True))
    (found,) = (x["curvature/sharpness"] for x in watched.state.log_history if "curvature/sharpness" in x)
    net = model().eval()
    net.load_state_dict(snapshot.weights[2])
    expected = hs.eigs(hs.hessian(hs.causal_lm(net, tokens(2, 3), batch_size=2)), k=1, which="LA", tol=1e-4)
    assert found == pytest.approx(float(expected.eigenvalues), rel=1e-5)


def test_a_forward_that_mixed_precision_sets_is_back_after_a_failure_too() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    before = net.forward
    net._original_forward = before
    net.forward = patched = torch.autocast("cpu", torch.bfloat16)(before)
    x = torch.ones(1, 2)
    assert net(x).dtype == torch.bfloat16
    with undisturbed(net):
        assert net(x).dtype == torch.float32
    assert net(x).dtype == torch.bfloat16
    with pytest.raises(KeyError), undisturbed(net):
        raise KeyError
    assert vars(net)["forward"] is patched
    assert vars(net)["_original_forward"] is before


def test_it_reaches_what_the_trainer_reports_to(tmp_path: Path) -> None:
    class Report(TrainerCallback):
        seen: list[dict[str, float]] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            self.seen.append(dict(logs))

    train(tmp_path, [Report], attach=callback())
    assert sum("curvature/trace" in logs for logs in Report.seen) == 3


def test_a_later_search_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    """At a loose tolerance it makes the steps that show a new direction, and ends far more precise."""
    own = callback(max_products=60, tol=0.02, trace_probes=0)
    watched = train(tmp_path, attach=own, learning_rate=1e-5)
    logged = [x for x in watched.state.log_history if "curvature/products" in x]
    cold, *warm = ((x["curvature/products"], x["curvature/sharpness_residual"]) for x in logged)
    assert all(products <= cold[0] + 3 and residual < 0.05 * cold[1] for products, residual in warm)


# ---- the preconditioner, by hand


def test_the_preconditioned_operator_is_written_out() -> None:
    net = nn.Linear(2, 1).double()
    problem = hs.supervised(net, [(torch.randn(4, 2).double(), torch.randn(4, 1).double())], loss="mse")
    for amsgrad in (False, True):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-3, amsgrad=amsgrad)
        for _ in range(3):
            optimizer.zero_grad()
            problem.loss.total(net, problem.batches[0])[0].backward()
            optimizer.step()
        H = hs.hessian(problem)
        v = torch.cat([optimizer.state[p]["max_exp_avg_sq" if amsgrad else "exp_avg_sq"].flatten() for p in net.parameters()])  # fmt: skip
        D = (v / (1 - 0.95**3)).sqrt() + 1e-3
        expected = D.rsqrt().diag() @ H.to_dense() @ D.rsqrt().diag()
        torch.testing.assert_close(preconditioned(H, optimizer, net).to_dense(), expected, rtol=1e-12, atol=0)


def test_what_adam_has_never_moved_is_left_out() -> None:
    """A row of an embedding that training has not seen has v = 0; with D = eps there it would drown everything else."""
    net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1)).double()
    seen = [(torch.tensor([0, 1]), torch.randn(2, 1).double())]
    everything = [(torch.tensor([0, 1, 2]), torch.randn(3, 1).double())]
    trained, probed = hs.supervised(net, seen, loss="mse"), hs.supervised(net, everything, loss="mse")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    H = hs.hessian(probed)
    assert not preconditioned(H, optimizer, net).to_dense().any()  # no step yet
    trained.loss.total(net, trained.batches[0])[0].backward()
    optimizer.step()
    A = preconditioned(H, optimizer, net).to_dense()
    unseen = [i for i, label in enumerate(H.space.labels) if label.startswith("0.weight[2,")]
    assert H.to_dense()[unseen].any()
    assert not A[unseen].any()
    assert 0 < float(torch.linalg.eigvalsh(A).max()) < 1e4
    assert left_out(preconditioned(H, optimizer, net)) == len(unseen) == 2
    state = type("State", (), {"global_step": 2, "epoch": 0.5, "log_history": []})
    own = hs.CurvatureCallback(lambda _: probed, every=2, max_products=4, trace_probes=0, preconditioned=True)
    own.on_train_begin(None, state, None, model=net, optimizer=optimizer)
    own.on_step_end(None, state, None, model=net, optimizer=optimizer)
    assert state.log_history[0]["curvature/preconditioned_left_out"] == 2


def test_scales_of_bfloat16_parameters_are_computed_in_float32() -> None:
    net = nn.Linear(2, 1).bfloat16()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-3)
    net(torch.tensor([[1.0, 2.0]]).bfloat16()).sum().backward()
    optimizer.step()
    problem = hs.supervised(net, [(torch.ones(1, 2).bfloat16(), torch.ones(1, 1).bfloat16())], loss="mse")
    found = preconditioned(hs.hessian(problem, hs.select(problem, "weight")), optimizer, net).scales["weight"]
    state = optimizer.state[net.weight]
    expected = ((state["exp_avg_sq"].double() / (1 - 0.999 ** int(state["step"]))).sqrt() + 1e-3).rsqrt()
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)


def test_another_state_than_adams_is_refused() -> None:
    net = nn.Linear(2, 1).double()
    problem = hs.supervised(net, [(torch.randn(4, 2).double(), torch.randn(4, 1).double())], loss="mse")
    optimizer = torch.optim.Adamax(net.parameters(), lr=0.01)
    problem.loss.total(net, problem.batches[0])[0].backward()
    optimizer.step()
    with pytest.raises(hs.HesscopeError, match="Expected the optimizer to keep Adam's exp_avg_sq and step for weight"):
        preconditioned(hs.hessian(problem), optimizer, net)


# ---- what goes wrong


def test_a_measurement_that_fails_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    class Diverging:
        def total(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
            return model(**batch).logits.sum() * float("inf"), 1

        def count(self, batch: Any) -> int:
            return 1

    own = hs.CurvatureCallback(lambda m: hs.Problem(m, Diverging(), [{"input_ids": tokens(2, 2)}]), every=3)
    with pytest.warns(hs.HesscopeWarning, match="No curvature at step 3"):
        watched = train(tmp_path, attach=own, max_steps=5)
    assert watched.state.global_step == 5


def test_memory_that_does_not_suffice_is_one_warning_and_training_goes_on(tmp_path: Path) -> None:
    class TooLarge(Drawing):
        tries = 0

        def total(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
            TooLarge.tries += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def count(self, batch: Any) -> int:
            return 1

    own = hs.CurvatureCallback(lambda m: hs.Problem(m, TooLarge(), [{"input_ids": tokens(2, 2)}]), every=2)
    with pytest.warns(hs.HesscopeWarning) as said:
        watched = train(tmp_path, attach=own)
    assert_same(watched, train(tmp_path))
    assert [str(w.message)[:24] for w in said if w.category is hs.HesscopeWarning] == ["No curvature at step 2, "]
    assert TooLarge.tries >= 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"every": 0}, "every"),
        ({"k": 0}, "k of at least 1"),
        ({"k": 30}, "max_products of at least k"),
        ({"trace_probes": 1}, "trace_probes of 0 or at least 2"),
        ({"operator": "fisher"}, "hessian or ggn"),
    ],
)
def test_refusals(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(hs.HesscopeError, match=said):
        hs.CurvatureCallback(tokens(2, 3), **{"every": 2, **wrong})


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adamax])
def test_what_is_not_adam_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(hs.HesscopeError, match=f"Expected Adam or AdamW .* got {kind.__name__}"):
        require_adam(kind(model.parameters(), lr=0.1), model, hs.select(model))  # type: ignore[call-arg]


def test_another_optimizer_is_refused_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(hs.HesscopeError, match="Expected Adam or AdamW"):
        train(tmp_path, attach=callback(preconditioned=True), optim="sgd")


def test_a_function_that_gives_no_problem_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hs.HesscopeError, match="to give a problem, got int"):
        train(tmp_path, attach=hs.CurvatureCallback(lambda m: 3))
