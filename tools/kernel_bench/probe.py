"""Where the grouped products go wrong: `python -m tools.kernel_bench.probe`."""

import torch

from saccade.kernels import experts as e
from saccade.kernels import reference
from tools.kernel_bench.rows import make_coded


def main() -> None:
    torch.manual_seed(0)
    gate_up, down = make_coded(256, 512, 7168), make_coded(256, 7168, 256)
    for name, make in (
        ("as is", lambda w: w),
        ("scales 1", lambda w: w._replace(scale=torch.full_like(w.scale, 2**-10))),
    ):
        gu, dn = make(gate_up), make(down)
        t = 8
        x = torch.randn(t, 7168, device="cuda")
        ids = torch.stack([torch.randperm(256, device="cuda")[:8] for _ in range(t)])
        weights = torch.rand(t, 8, device="cuda")
        first, last = e.spell(gu), e.spell(dn)
        want = []
        for a in range(t):
            for i in range(8):
                w = reference.decode(reference.pick(gu, ids[a, i : i + 1]))[0]
                want.append(reference.silu_and_mul((x[a] @ w.T)[None])[0])
        want = torch.stack(want)
        for rescales in (True, False):
            for stages in (1, 2, 3, 4):
                for columns in (64, 128):
                    tile = e.TILE._replace(rescales=rescales, stages=stages, columns=columns)
                    size = 16
                    tiles = e.arrange(ids, 256, size)
                    hidden = torch.full((t * 8, 256), float("nan"), device="cuda")
                    try:
                        e._launch(e._write(x, first), first, tiles, weights, hidden, 8, True, tile)
                        got = torch.empty_like(hidden)
                        got[tiles.order.long()] = hidden
                        bad = ((got - want).norm(dim=1) / want.norm(dim=1) > 1e-2) | got.isnan().any(1)
                        print(
                            name,
                            "gate",
                            rescales,
                            stages,
                            columns,
                            float((got - want).norm() / want.norm()),
                            "bad rows",
                            int(bad.sum()),
                            "nan",
                            int(got.isnan().sum()),
                        )
                        inp = want[tiles.order.long()].contiguous()
                        pairs = torch.full((t * 8, 7168), float("nan"), device="cuda")
                        e._launch(e._write(inp, last), last, tiles, weights, pairs, 8, False, tile)
                        ref = torch.stack(
                            [
                                want[p]
                                @ reference.decode(reference.pick(dn, ids.flatten()[p : p + 1]))[0].T
                                * weights.flatten()[p]
                                for p in range(t * 8)
                            ]
                        )
                        bad = ((pairs - ref).norm(dim=1) / ref.norm(dim=1) > 1e-2) | pairs.isnan().any(1)
                        print(
                            name,
                            "down",
                            rescales,
                            stages,
                            columns,
                            float((pairs - ref).norm() / ref.norm()),
                            "bad rows",
                            int(bad.sum()),
                            "nan",
                            int(pairs.isnan().sum()),
                        )
                    except Exception as error:
                        print(name, rescales, stages, columns, str(error)[:100])


if __name__ == "__main__":
    main()
