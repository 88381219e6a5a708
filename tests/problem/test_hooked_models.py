"""Models called as TransformerLens's are; a stand-in of the same interface, and the real one where it is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
import oracles
from architectures import VOCABULARY, ragged_batches


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        weights = (self.attn(x) @ x.mT).masked_fill(~allowed, -1e4).softmax(-1)
        return x + torch.tanh(self.mlp(weights @ x))


class Hooked(nn.Module):
    """`cfg`, tokens as the first argument under the name `input`, logits as a tensor; any other keyword is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(n_ctx=16, d_vocab=VOCABULARY, d_model=6)
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.unembed = nn.Linear(6, VOCABULARY)

    def forward(
        self, input: Tensor, return_type: str | None = "logits", attention_mask: Tensor | None = None
    ) -> Tensor:
        x, T = self.embed(input), input.shape[1]
        allowed = torch.ones(T, T, dtype=torch.bool).tril()
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, :].bool()
        for block in self.blocks:
            x = block(x, allowed)
        assert return_type == "logits"
        return self.unembed(x)


def hooked() -> Hooked:
    torch.manual_seed(0)
    return Hooked().double().eval()


class Returning(nn.Module):
    """The same model the Hugging Face way, for the oracle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return SimpleNamespace(logits=self.model(input_ids, attention_mask=attention_mask))


def test_its_hessian_and_ggn_are_those_of_the_same_model_the_other_way() -> None:
    model = hooked()
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, layers="mlp", blocks=1)
    dense = oracles.causal_lm(Returning(model), ragged_batches(), hs.select(Returning(model), layers="mlp", blocks=1))
    assert problem.risk() == pytest.approx(dense.risk, rel=1e-12)
    assert oracles.relative(hs.hessian(problem, space).to_dense(), dense.hessian) < 1e-10
    linear = oracles.linearized_lm(
        Returning(model), ragged_batches(), hs.select(Returning(model), layers="mlp", blocks=1)
    )
    assert oracles.relative(hs.ggn(problem, space).to_dense(), linear.ggn()) < 1e-10
    assert hs.block(hs.hessian(problem, space)).matrix.shape == (36, 36)


def test_its_context_and_vocabulary_are_known() -> None:
    with pytest.raises(hs.HesscopeError, match="16"):
        hs.causal_lm(hooked(), torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(hs.HesscopeError, match=str(VOCABULARY)):
        hs.causal_lm(hooked(), torch.full((1, 4), VOCABULARY))


def test_its_own_tokenizer_reads_text() -> None:
    from characters import tokenizer

    model = hooked()
    model.tokenizer = tokenizer()
    assert hs.causal_lm(model, ["abc abc"], length=6).N > 0


def test_a_model_with_a_configuration_is_called_as_before() -> None:
    from architectures import tiny
    from hesscope.models import is_hooked

    assert not is_hooked(tiny("gpt2"))
    assert is_hooked(hooked())


@pytest.mark.filterwarnings("ignore")
def test_the_real_one_gives_the_hessian_of_its_own_logits() -> None:
    lens = pytest.importorskip(
        "transformer_lens", reason="TransformerLens is not installed: pip install 'hesscope[lens]'"
    )
    try:
        Real, Config = lens.HookedTransformer, lens.HookedTransformerConfig
    except ImportError:
        pytest.skip("this version of TransformerLens has no HookedTransformer")
    config = Config(n_layers=2, d_model=8, n_ctx=16, d_head=4, n_heads=2, d_mlp=12, d_vocab=VOCABULARY,
                                          act_fn="gelu", normalization_type="LN", seed=0, device="cpu",
                                          dtype=torch.float64)  # fmt: skip
    model = Real(config).eval()
    batches = [{"input_ids": batch["input_ids"]} for batch in ragged_batches()]
    problem = hs.causal_lm(model, batches)
    space = hs.select(problem, "blocks.1.mlp.W_in")
    dense = oracles.causal_lm(Returning(model), batches, hs.select(Returning(model), "model.blocks.1.mlp.W_in"))
    assert oracles.relative(hs.hessian(problem, space).to_dense(), dense.hessian) < 1e-6
