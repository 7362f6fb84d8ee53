# ruff: noqa: E731
"""Every class and option that iin_fast.dropin knows, as small models with their calls."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@dataclass
class Case:
    """``build()`` gives the module, ``calls`` its uses by name: ``call(module, x)`` to tensors, or to numbers."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    calls: dict[str, Callable[[nn.Module, Tensor], Any]]
    replaced: int  # modules or attributes that are replaced
    unit: bool = False  # inputs in [0, 1]
    loose: float = 1.0  # how much farther apart two correct results may be
    dtype: torch.dtype | None = None  # that the library turns an input to


class Net(nn.Module):
    """A small conditioner; its weights are wide enough that every bin and branch of a spline is used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.hidden_features = 9
        self.layers = nn.Sequential(nn.Linear(inputs, 9), nn.Tanh(), nn.Linear(9, outputs))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.8)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y: Tensor = self.layers(x.movedim(1, -1)).movedim(-1, 1)
        return y


def spread(module: nn.Module, std: float = 0.4) -> nn.Module:
    """All parameters drawn anew, so that no branch stays at its starting point."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return module


TWO_WAYS = {"forward": lambda m, x: m(x), "inverse": lambda m, x: m.inverse(x)}


def nflows_cases() -> list[Case]:
    from nflows import transforms as T

    def coupling(cls: Any, **options: Any) -> Callable[[], nn.Module]:
        return lambda: cls([1, 0, 1, 0, 1], Net, **options)

    cases = [
        Case("nflows affine", coupling(T.AffineCouplingTransform), (7, 5), TWO_WAYS, 1),
        Case("nflows affine image", coupling(T.AffineCouplingTransform), (3, 5, 2, 3), TWO_WAYS, 1),
        Case("nflows additive", coupling(T.AdditiveCouplingTransform), (7, 5), TWO_WAYS, 1),
    ]
    for tails in ("linear", None):
        for own in (False, True):
            options = {"tails": tails, "tail_bound": 1.5, "num_bins": 6, "apply_unconditional_transform": own}
            spline = coupling(T.PiecewiseRationalQuadraticCouplingTransform, **options)
            name = f"nflows spline tails={tails} unconditional={own}"
            cases.append(Case(name, spline, (7, 5), TWO_WAYS, 1 + own, tails is None, 20))
        masked = lambda tails=tails: spread(
            T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(5, 12, tails=tails, tail_bound=1.5, num_bins=6)
        )
        cases.append(Case(f"nflows masked spline tails={tails}", masked, (7, 5), TWO_WAYS, 1, tails is None, 300))
    image = coupling(T.PiecewiseRationalQuadraticCouplingTransform, tails="linear", num_bins=4, min_derivative=0.01)
    cases.append(Case("nflows spline image", image, (3, 5, 2, 3), TWO_WAYS, 1, loose=20))
    return cases


def normflows_cases() -> list[Case]:
    import normflows as nf

    cases = []
    for scale_map in ("exp", "sigmoid", "sigmoid_inv"):
        for split in ("channel", "channel_inv"):
            build = lambda scale_map=scale_map, split=split: nf.flows.AffineCouplingBlock(
                Net(3, 6), scale_map=scale_map, split_mode=split
            )
            cases.append(Case(f"normflows affine {scale_map} {split}", build, (7, 6), TWO_WAYS, 1))
    for s, t in ((True, True), (False, True), (True, False)):
        mask = lambda s=s, t=t: nf.flows.MaskedAffineFlow(
            torch.tensor([1.0, 0, 1, 0, 0]), Net(5, 5) if t else None, Net(5, 5) if s else None
        )
        cases.append(Case(f"normflows masked s={s} t={t}", mask, (7, 5), TWO_WAYS, 1))
    for tails in ("linear", "circular", None):
        build = lambda tails=tails: spread(
            nf.flows.CoupledRationalQuadraticSpline(5, 1, 8, tails=tails, tail_bound=1.5, num_bins=6)
        )
        cases.append(Case(f"normflows coupled spline tails={tails}", build, (7, 5), TWO_WAYS, 2, tails is None, 20))
    masked = lambda: spread(nf.flows.AutoregressiveRationalQuadraticSpline(5, 1, 8, tail_bound=1.5, num_bins=6))
    cases.append(Case("normflows masked spline", masked, (7, 5), TWO_WAYS, 1, loose=300))
    return cases


def freia_cases() -> list[Case]:
    import FrEIA.modules as Fm

    cases = []

    def add(name: str, cls: Any, shape: tuple[int, ...], conditions: int = 0, loose: float = 1, **options: Any) -> None:
        features = [shape[1:]]
        condition = [(2, *shape[2:])] * conditions

        def call(rev: bool) -> Callable[[nn.Module, Tensor], Any]:
            given = torch.randn(conditions, shape[0], 2, *shape[2:], generator=torch.Generator().manual_seed(3))
            return lambda m, x: m([x], list(given.to(x)), rev=rev)

        build = lambda: cls(features, dims_c=condition, subnet_constructor=Net, **options)
        cases.append(
            Case(f"FrEIA {name}", build, shape, {"forward": call(False), "inverse": call(True)}, 1, loose=loose)
        )

    for cls in ("GLOWCouplingBlock", "RNVPCouplingBlock", "GINCouplingBlock", "AffineCouplingOneSided"):
        block = getattr(Fm, cls)
        for clamp in ("ATAN", "TANH", "SIGMOID"):
            add(f"{cls} {clamp}", block, (7, 5), clamp_activation=clamp, clamp=1.3)
        add(f"{cls} custom", block, (7, 5), clamp_activation=lambda u: u / (1 + u.abs()))
        add(f"{cls} conditional", block, (7, 5), conditions=2, split_len=2)
        add(f"{cls} image", block, (3, 4, 2, 3))
    for clamp in ("ATAN", "TANH", "SIGMOID"):
        add(f"ConditionalAffineTransform {clamp}", Fm.ConditionalAffineTransform, (7, 5), 2, clamp_activation=clamp)
    for options in ({}, {"gin_block": True}, {"affine_clamping": 1.2, "reverse_permutation": True}):
        add(f"AllInOneBlock {options}", Fm.AllInOneBlock, (7, 5), **options)
    try:  # broken in some versions
        Fm.AllInOneBlock([(5,)], subnet_constructor=Net, learned_householder_permutation=2)
        add("AllInOneBlock householder", Fm.AllInOneBlock, (7, 5), learned_householder_permutation=2)
    except UnboundLocalError:
        pass
    add("AllInOneBlock conditional image", Fm.AllInOneBlock, (3, 4, 2, 3), 1, global_affine_type="EXP")
    if hasattr(Fm, "RationalQuadraticSpline"):
        for options in ({}, {"identity_tails": True}, {"domain_clamping": 2.0}, {"bins": 3, "split_len": 2}):
            add(f"RationalQuadraticSpline {options}", Fm.RationalQuadraticSpline, (7, 5), loose=100, **options)
        both = {"identity_tails": True, "domain_clamping": 2.0}
        add("RationalQuadraticSpline both", Fm.RationalQuadraticSpline, (7, 5), 1, loose=100, **both)
        add("RationalQuadraticSpline image", Fm.RationalQuadraticSpline, (3, 4, 2, 3), loose=100)
    return cases


def zuko_cases() -> list[Case]:
    import zuko

    def ways(context: bool) -> dict[str, Callable[[nn.Module, Tensor], Any]]:
        c = torch.randn(1, 2, generator=torch.Generator().manual_seed(3)) if context else None

        def at(m: nn.Module, x: Tensor) -> Any:
            return m(None if c is None else c.to(x).expand(len(x), 2))

        return {
            "forward": lambda m, x: at(m, x).call_and_ladj(x),
            "call": lambda m, x: at(m, x)(x),
            "ladj": lambda m, x: at(m, x).log_abs_det_jacobian(x, at(m, x)(x)),
            "inverse": lambda m, x: at(m, x).inv.call_and_ladj(x),
        }

    def flow(cls: Any, **options: Any) -> Callable[[], nn.Module]:
        """One layer; whole flows are the business of test_programs_zuko.py."""
        return lambda: spread(cls(5, transforms=2, hidden_features=(8,), **options).transform.transforms[1])

    cases = []
    for context in (0, 2):
        for name in ("MAF", "NSF", "NICE"):
            build = flow(getattr(zuko.flows, name), context=context)
            loose = 3000 if name == "NSF" else 100
            cases.append(Case(f"zuko {name} context={context}", build, (7, 5), ways(context > 0), 1, loose=loose))
    coupling = flow(zuko.flows.NSF, passes=2, bins=4)
    cases.append(Case("zuko NSF coupling", coupling, (7, 5), ways(False), 1, loose=1000))
    bare = lambda: spread(
        zuko.flows.ElementWiseTransform(5, univariate=zuko.transforms.MonotonicRQSTransform, shapes=[(4,), (4,), (3,)])
    )
    cases.append(Case("zuko elementwise spline", bare, (7, 5), ways(False), 1, loose=20))
    return cases


def published_cases() -> list[Case]:
    cases = []
    both = {"forward": lambda m, x: m(x), "inverse": lambda m, x: m(x, reverse=True)}
    four = {key: (lambda m, x, call=call: call(m, x[:, :, None, None])) for key, call in both.items()}
    if has("iin.models.iin") and has("edflow"):
        from iin.models import iin

        def started(module: nn.Module, *shape: int) -> nn.Module:
            spread(module, 0.2)
            with torch.no_grad():
                module(torch.randn(16, *shape))
            return spread(module, 0.4)

        parts = [iin.VectorActNorm, iin.DoubleVectorCouplingBlock, iin.Shuffle]
        stack = lambda depth: lambda: started(iin.EfficientVRNVP(parts, 6, 3, 10, depth), 6)
        for depth in (0, 2):
            cases.append(Case(f"iin stack depth={depth}", stack(depth), (7, 6), both, 10, loose=300))
        odd = lambda: started(iin.EfficientVRNVP(parts[1:], 6, 2, 10, 1), 6)
        cases.append(Case("iin stack of couplings and shuffles", odd, (7, 6), both, 4, loose=100))
        cases.append(
            Case("iin coupling", lambda: spread(iin.DoubleVectorCouplingBlock(6, 10)), (7, 6), both, 1, loose=10)
        )
        norm = lambda: started(iin.VectorActNorm(6), 6)
        cases.append(Case("iin norm", norm, (7, 6), {"forward": both["forward"]}, 1, loose=10))
        cases.append(Case("iin shuffle", lambda: iin.Shuffle(6), (7, 6), {"inverse": both["inverse"]}, 1))
    if has("net2net.modules.flow.flatflow"):
        from net2net.modules.flow import blocks, flatflow

        def run(module: nn.Module, *inputs: Tensor) -> nn.Module:
            spread(module, 0.2)
            with torch.no_grad():
                module(*inputs)
            return spread(module, 0.4)

        for channels in (6, 5):
            build = lambda channels=channels: run(
                flatflow.UnconditionalFlatCouplingFlow(channels, 3, 10, 1), torch.randn(16, channels)
            )
            cases.append(Case(f"net2net stack {channels}", build, (7, channels), both, 10, loose=300))
        pure = lambda: spread(flatflow.PureAffineFlatCouplingFlow(6, 3, 10, 1))
        cases.append(Case("net2net pure stack", pure, (7, 6), both, 4, loose=300))
        cases.append(
            Case("net2net coupling", lambda: spread(blocks.DoubleVectorCouplingBlock(6, 10)), (7, 6), four, 1, loose=10)
        )
        condition = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
        given = {
            "forward": lambda m, x: m(x[:, :, None, None], condition.to(x)),
            "inverse": lambda m, x: m(x[:, :, None, None], condition.to(x), reverse=True),
        }
        for option in ("none", "sequential"):
            for activation in ("lrelu", "none"):
                build = lambda option=option, activation=activation: run(
                    flatflow.ConditionalFlatCouplingFlow(6, 3, 4, 10, 1, 2, option, activation),
                    torch.randn(16, 6, 1, 1),
                    torch.randn(16, 3),
                )
                name = f"net2net conditional {option} {activation}"
                cases.append(Case(name, build, (7, 6), given, 7, loose=300, dtype=torch.float32))
        build = lambda: run(blocks.ConditionalFlow(6, 3, 10, 1, 2), torch.randn(16, 6, 1, 1), torch.randn(16, 3))
        cases.append(Case("net2net ConditionalFlow", build, (7, 6), given, 7, loose=300))
        if has("invariances.model.blocks"):
            from invariances.model import blocks as theirs

            build = lambda: run(theirs.ConditionalFlow(6, 3, 10, 1, 2), torch.randn(16, 6, 1, 1), torch.randn(16, 3))
            cases.append(Case("invariances ConditionalFlow", build, (7, 6), given, 7, loose=300))
    return cases


def all_cases() -> list[Case]:
    cases: list[Case] = []
    for package, make in (
        ("nflows", nflows_cases),
        ("normflows", normflows_cases),
        ("FrEIA", freia_cases),
        ("zuko", zuko_cases),
    ):
        if has(package):
            cases += make()
    return cases + published_cases()
