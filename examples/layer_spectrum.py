"""The spectrum of one layer against the whole of the model that comes along: `python examples/layer_spectrum.py`."""

from __future__ import annotations

from pathlib import Path

import hesscope as hs
from hesscope.assets import model_path, prose

SELECTIONS = {
    "whole model": (),
    "last block, MLP": ("model.layers.3.mlp.*",),
    "last block, queries and keys": ("model.layers.3.self_attn.q_proj.*", "model.layers.3.self_attn.k_proj.*"),
}


def main(output_dir: Path) -> None:
    problem = hs.causal_lm(model_path(), [prose("held_out")], length=64, sequences=2, batch_size=2, pack=True)
    print(f"a byte-level Llama on {problem.N} bytes of held-out prose: loss {problem.risk():.3f} nats a byte")
    print(f"{'':30}{'weights':>9}{'largest':>10}{'smallest':>10}{'trace per weight':>18}")

    output_dir.mkdir(parents=True, exist_ok=True)
    for title, patterns in SELECTIONS.items():
        space = hs.select(problem, *patterns)
        # The Hessian of a selection is a diagonal block of the whole one: its spectrum lies inside the whole one's.
        H = hs.hessian(problem, space)
        ends = hs.eigs(H, k=2, which="BE", tol=5e-2)
        spectrum = hs.density(H, probes=3, steps=15)
        spectrum.plot(output_dir / f"{title.replace(' ', '-').replace(',', '')}.png")
        largest, smallest = ends.eigenvalues.tolist()
        mean, error = spectrum.moments[0].item(), spectrum.moments_standard_error[0].item()
        print(f"{title:30}{space.size:9,}{largest:10.3g}{smallest:10.2g}{mean:12.2g} +- {error:.1g}")

    print("drawn:", *sorted(path.name for path in output_dir.glob("*.png")))


if __name__ == "__main__":
    main(Path("runs/layer-spectrum"))
