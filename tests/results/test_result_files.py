"""Every kind of result comes back from its folder as it went in, and nothing half-written or damaged is taken for one."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.results import Block, Diagonal, Result, Verification
from hesscope.results import base as base_module
from spectra import generic

COST = {"products": 3, "units": 4.5, "seconds": 0.25, "provenance": {"options": {"seed": 1}}}


def operator(dtype: torch.dtype = torch.float64) -> hs.Operator:
    return hs.operator(generic(12).to(dtype))


def of_a_model() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    batches = [(torch.randn(b, 3), torch.arange(b) % 2) for b in (2, 5)]
    return hs.hessian(hs.supervised(model, batches))


def verification() -> Verification:
    return Verification(
        **COST,
        names=["symmetry", "linearity"],
        explanations=["<u, Hv> = <v, Hu>", "H(u + v) = Hu + Hv"],
        measured=torch.tensor([1e-9, float("nan")], dtype=torch.float64),
        limits=torch.tensor([1e-6, 1e-6], dtype=torch.float64),
    )


KINDS: dict[str, Callable[[], Result]] = {
    "approximations": lambda: hs.approximations(
        hs.operator(generic(12)), others={"one": hs.operator(torch.eye(12).double())}
    ),
    "approximations, parts alone": lambda: hs.approximations(of_a_model(), kinds=["diagonal", "rows"]),
    "block": lambda: hs.block(operator()),
    "block of float32": lambda: hs.block(operator(torch.float32)),
    "block of bfloat16": lambda: Block(**COST, matrix=torch.eye(2).bfloat16(), labels=["a[0]", "a[1]"], asymmetry=0.0),
    "convergence": lambda: hs.convergence(of_a_model().problem, keep=[2, 7]),
    "convergence, nothing kept": lambda: hs.convergence(of_a_model().problem, keep="none"),
    "diagonal": lambda: hs.diagonal(operator(), method="hutchinson", budget=5),
    "diagonal, one probe": lambda: hs.diagonal(operator(), method="hutchinson", budget=1),
    "diagonal, exact": lambda: hs.diagonal(of_a_model()),
    "diagonal, drawn seed": lambda: hs.diagonal(of_a_model(), method="hutchinson", budget=5, seed=None),
    "eigs": lambda: hs.eigs(operator(), k=3),
    "eigs of a model": lambda: hs.eigs(of_a_model(), k=2, seed=None),
    "eigs-track": lambda: hs.track_eigs({"a/1": operator(), "b": operator()}, k=2, cold=True),
    "eigs-track of one": lambda: hs.track_eigs({"a": operator()}, k=2),
    "groups": lambda: hs.groups(of_a_model(), by=lambda name: name, probes=2, steps=3, max_products=4, tol=10.0),
    "lanczos": lambda: hs.lanczos(operator(), 4),
    "lanczos with its basis": lambda: hs.lanczos(of_a_model(), 4, keep_basis=True),
    "perplexity-study": lambda: hs.perplexity_study(of_a_model().problem),
    "trace": lambda: hs.trace(operator(), method="hutchinson", budget=5),
    "trace, one probe": lambda: hs.trace(operator(), method="hutchinson", budget=1),
    "trace, exact": lambda: hs.trace(of_a_model()),
    "density": lambda: hs.density(operator(), probes=2, steps=4),
    "structure": lambda: hs.structure(of_a_model()),
    "structure, singular": lambda: hs.structure(hs.operator(torch.zeros(3, 3))),
    "structure-comparison": lambda: hs.structure({"a model": of_a_model(), "z/first": operator()}),
    "verify": verification,
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def same(a: Any, b: Any) -> bool:
    """Equal, with NaN equal to itself, tensors by dtype and bits, and dictionaries in their order."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b or (a != a and b != b))


@every_kind
def test_a_result_comes_back_as_it_was(make: Callable[[], Result], tmp_path: Path) -> None:
    result = make()
    folder = result.save(tmp_path / "runs" / "one")
    expected = ["manifest.json", "result.safetensors", *result.files()]
    assert sorted(p.name for p in folder.iterdir()) == sorted(expected)
    again = hs.load(str(folder))
    assert type(again) is type(result)
    for field in dataclasses.fields(result):
        assert same(getattr(result, field.name), getattr(again, field.name)), field.name
    assert again.summary() == result.summary()
    assert same(result.error(), again.error())


@every_kind
def test_vectors_come_back_in_the_selections_order(make: Callable[[], Result], tmp_path: Path) -> None:
    """`flat()`, `eigenvectors` and `basis` join parameters in the dictionary's order; safetensors sorts by name."""
    result = make()
    again = hs.load(result.save(tmp_path / "run"))
    for name in ("flat", "eigenvectors", "basis"):
        if hasattr(result, name):
            before, after = (getattr(r, name) for r in (result, again))
            assert same(*(x() if callable(x) else x for x in (before, after)))


@every_kind
def test_the_manifest_is_plain_json(make: Callable[[], Result], tmp_path: Path) -> None:
    result = make()
    text = (result.save(tmp_path / "run") / "manifest.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    manifest = json.loads(text, parse_constant=refuse)
    assert manifest["kind"] == result.kind
    assert (manifest["products"], manifest["units"]) == (result.products, result.units)
    assert manifest["error"] == json.loads(json.dumps(base_module.jsonable(result.error())))
    assert "options" in manifest["provenance"]


def test_the_manifest_names_options_versions_and_the_problems_fingerprint(tmp_path: Path) -> None:
    H = of_a_model()
    result = hs.trace(H, method="hutchinson", budget=4, seed=7)
    provenance = json.loads((result.save(tmp_path / "run") / "manifest.json").read_text())["provenance"]
    assert provenance["options"] == {"method": "hutchinson", "budget": 4, "target_error": None, "seed": 7}
    assert {"python", "hesscope", "torch"} <= set(provenance["versions"])
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["problem"]["fingerprint"] == H.origin()["fingerprint"]
    assert len(provenance["problem"]["fingerprint"]) > 8
    assert provenance["selection"]["size"] == H.shape[0]
    assert provenance["operator"]["operator"] == "hessian"


def test_one_fingerprint_and_one_seed_are_the_same_numbers() -> None:
    first, second = (hs.diagonal(of_a_model(), method="hutchinson", budget=5) for _ in range(2))
    fingerprints = [r.provenance["problem"]["fingerprint"] for r in (first, second)]
    assert fingerprints[0] == fingerprints[1]
    assert torch.equal(first.flat(), second.flat())


@every_kind
def test_a_result_is_frozen(make: Callable[[], Result]) -> None:
    result = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.products = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.anything = 0


def test_tensors_that_share_or_skip_memory_are_saved_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parts = {"a.weight": base.T, "b/with.slash": base[:, ::2], "scalar": base[0, 0]}
    result = Diagonal(**COST, method="hutchinson", values=parts, standard_error=dict(parts), relative_error=0.5,
                      degrees_of_freedom=2, seed=0)  # fmt: skip
    again = hs.load(result.save(tmp_path / "run"))
    assert same(again.values, parts)
    assert list(again.values) == list(parts)


# ---- folders


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    first, second = hs.trace(operator(), seed=1), hs.eigs(operator(), k=2)
    folder = first.save(tmp_path / "run")
    with pytest.raises(hs.HesscopeError, match=r"already holds a run.*overwrite"):
        second.save(folder)
    assert hs.load(folder).kind == "trace"
    second.save(folder, overwrite=True)
    assert hs.load(folder).kind == "eigs"


def test_a_folder_without_a_run_may_be_used_and_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    hs.trace(operator()).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert hs.load(tmp_path).kind == "trace"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(hs.HesscopeError, match="'run' to be a folder"):
        hs.trace(operator()).save(tmp_path / "run", overwrite=True)


def everything_under(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("broken", ["manifest", "pt", "tensors"])
def test_an_exception_while_writing_leaves_nothing(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    target = {
        "manifest": "hesscope.results.base.jsonable",
        "pt": "torch.save",
        "tensors": "hesscope.tensor_file.Outgoing.write",
    }[broken]
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(OSError, match="No space left"):
            hs.trace(operator()).save(tmp_path / "run", also_pt=True)
    assert everything_under(tmp_path) == []
    # Nor does it harm an earlier run.
    hs.trace(operator()).save(tmp_path / "run")
    before = everything_under(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(OSError, match="No space left"):
            hs.eigs(operator(), k=2).save(tmp_path / "run", overwrite=True, also_pt=True)
    assert everything_under(tmp_path) == before
    assert hs.load(tmp_path / "run").kind == "trace"


def test_an_interruption_between_files_leaves_no_mixture_of_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tensors beside the old manifest would load, as a result that never was."""
    folder = hs.trace(operator(), seed=1).save(tmp_path / "run")
    replace, moved = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hs.trace(operator(), seed=2).save(folder, overwrite=True)
    assert len(moved) == 1
    with pytest.raises(hs.HesscopeError, match="to be the folder of a result"):
        hs.load(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ---- .pt


def test_also_pt_writes_what_plain_torch_reads(tmp_path: Path) -> None:
    block, diagonal = hs.block(operator()), hs.diagonal(of_a_model())
    plain = torch.load(block.save(tmp_path / "block", also_pt=True) / "result.pt", weights_only=True)
    assert torch.equal(plain, block.matrix)
    several = torch.load(diagonal.save(tmp_path / "diagonal", also_pt=True) / "result.pt", weights_only=True)
    assert same(several, diagonal.tensors())
    assert torch.equal(hs.load(tmp_path / "block" / "result.pt"), block.matrix)
    assert hs.load(tmp_path / "block").kind == "block"


def test_plain_tensor_files_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    matrix = generic(5)
    torch.save(matrix, tmp_path / "one.pt")
    torch.save({"a": matrix, "b": matrix.bfloat16()}, tmp_path / "two.pt")
    save_file({"hessian": matrix}, tmp_path / "one.safetensors")
    save_file({"a": matrix, "b": matrix.bfloat16()}, tmp_path / "two.safetensors")
    for ending in ("pt", "safetensors"):
        assert torch.equal(hs.load(tmp_path / f"one.{ending}"), matrix)
        assert same(hs.load(str(tmp_path / f"two.{ending}")), {"a": matrix, "b": matrix.bfloat16()})


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, ("executed",)


def test_a_pt_that_would_run_code_is_refused_and_does_not_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.ones(2), "extra": Malicious()}, tmp_path / "new.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "text.pt").write_text("not a tensor")
    for name in ("new.pt", "bare.pt", "text.pt"):
        with pytest.raises(hs.HesscopeError, match="plain tensors"):
            hs.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


# ---- damage


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "manifest cut": cut("manifest.json", 40),
    "manifest empty": cut("manifest.json", 0),
    "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest a list": lambda folder: rewrite(folder, lambda m: [m]),
    "manifest a number": lambda folder: rewrite(folder, lambda m: 3),
    "kind unknown": lambda folder: rewrite(folder, lambda m: {**m, "kind": "poem"}),
    "kind a list": lambda folder: rewrite(folder, lambda m: {**m, "kind": ["trace"]}),
    "kind gone": lambda folder: rewrite(folder, lambda m: {k: v for k, v in m.items() if k != "kind"}),
    "a fact gone": lambda folder: rewrite(folder, lambda m: {k: v for k, v in m.items() if k != "seed"}),
    "a number that is none": lambda folder: rewrite(folder, lambda m: {**m, "estimate": "many"}),
    "another kind": lambda folder: rewrite(folder, lambda m: {**m, "kind": "density"}),
    "tensors cut": cut("result.safetensors", 70),
    "tensors empty": cut("result.safetensors", 0),
    "tensors gone": lambda folder: (folder / "result.safetensors").unlink(),
    "tensors not tensors": lambda folder: (folder / "result.safetensors").write_text("not a tensor" * 9),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_result_is_an_error_in_one_sentence(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = hs.trace(operator(), method="hutchinson", budget=4).save(tmp_path / "run")
    damage(folder)
    with pytest.raises(hs.HesscopeError) as caught:
        hs.load(folder)
    assert "\n" not in str(caught.value)
    assert "run" in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "missing.pt", "result.npz", "empty"])
def test_what_is_no_result_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "result.npz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(hs.HesscopeError, match=r"Expected .*result"):
        hs.load(tmp_path / name)
