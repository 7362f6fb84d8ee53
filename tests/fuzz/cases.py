"""What the fuzz tests draw: each function takes a source of chance and checks one case. It raises where a promise is broken.

The promise is the same everywhere: what is right gives what its definition gives; what is wrong raises TypeError or ValueError, as a
command one line and exit code 2; and nothing else happens.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from flow.programs import tame
from torch import Tensor
from typer.testing import CliRunner

from iin_fast import IIN, backend, functional, nn
from iin_fast.cli import app
from iin_fast.data import load_latents, save_arrays
from iin_fast.flow import FlowProgram
from iin_fast.ops.affine_coupling import SQUASHES
from iin_fast.ops.spline_coupling import PARAMETERIZATIONS

__all__ = ["commands", "files", "made_run", "modules", "ops", "programs"]

REFUSED = (TypeError, ValueError)
WRONG: tuple[Any, ...] = (
    None,
    "text",
    -1,
    0,
    2.5,
    float("nan"),
    float("inf"),
    True,
    [],
    {},
    (1, 2),
    10**30,
    b"x",
    object(),
)
EXTREMES = (0.0, -0.0, 1e-45, 1e-30, 1.0, 88.0, -110.0, 1e4, 1e30, 3e38, torch.inf, -torch.inf, torch.nan)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensor(draw: Random, shape: tuple[int, ...], dtype: torch.dtype, wild: bool) -> Tensor:
    """Normal numbers, now and then with extremes among them, in memory with or without gaps."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(draw.getrandbits(32)), dtype=torch.float64)
    if wild and made.numel():
        for _ in range(draw.randint(1, 3)):
            made.view(-1)[draw.randrange(made.numel())] = draw.choice(EXTREMES)
    made = made.to(dtype)
    kind = draw.randrange(4)
    if kind == 0 and made.dim() == 2:
        return made.T.contiguous().T
    if kind == 1 and made.dim():
        return torch.stack([made, made], -1)[..., 0]
    if kind == 2 and made.dim() and made.shape[0]:
        return made[:1].expand(made.shape)
    return made


def spoilt(draw: Random, tensors: dict[str, Any], options: dict[str, Any]) -> None:
    """One argument becomes what it is not."""
    name = draw.choice([*tensors, *options])
    if name in options:
        options[name] = draw.choice(WRONG)
        return
    value, kind = tensors[name], draw.randrange(6)
    if kind == 0 or not isinstance(value, Tensor):
        tensors[name] = draw.choice(WRONG)
    elif kind == 1:
        tensors[name] = value.to(draw.choice([torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16]))
    elif kind == 2:
        tensors[name] = value[..., None] if draw.random() < 0.5 else value.flatten()
    elif kind == 3:
        tensors[name] = torch.cat([value, value]) if value.dim() else value[None]
    elif kind == 4:
        tensors[name] = value.to("meta")
    else:
        tensors[name] = value[..., :-1] if value.dim() else value.to_sparse()


def refused_or(call: Callable[[], Any]) -> Any:
    """The result, or None for a refusal of one line that names something."""
    try:
        return call()
    except REFUSED as error:
        assert str(error).strip() and "Traceback" not in str(error), repr(error)
        return None


def ops(draw: Random, folder: Path) -> None:
    """One op on drawn arguments: as its definition on moderate numbers; of the right shape, or refused, on all others."""
    name, dtype = draw.choice(["affine_coupling", "pair_nll", "spline_coupling"]), draw.choice(DTYPES)
    batch, dim, wild = draw.choice([0, 1, 2, 7, 33]), draw.choice([1, 2, 3, 8, 17, 70]), draw.random() < 0.5
    tensors: dict[str, Any]
    options: dict[str, Any]
    if name == "affine_coupling":
        tensors = {key: tensor(draw, (batch, dim), dtype, wild) for key in ("x", "raw_scale", "shift")}
        options = {"squash": draw.choice(list(SQUASHES)), "inverse": draw.random() < 0.5}
        if options["squash"] == "none":
            tensors["raw_scale"] = None
    elif name == "pair_nll":
        cuts = sorted(draw.sample(range(1, dim), min(dim - 1, draw.randint(0, 3)))) if dim > 1 else []
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, dim], strict=True)]
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {key: tensor(draw, (batch, dim), dtype, wild) for key in ("za", "zb")}
        tensors |= {key: tensor(draw, (batch,), sums, wild) for key in ("logdet_a", "logdet_b")}
        tensors["shared"] = torch.rand(batch, len(sizes)) < 0.5
        options = {
            "sizes": sizes,
            "rho": draw.choice([0.1, 0.975, 0.999999, 1 - 1e-12]),
            "normalized": draw.random() < 0.5,
        }
    else:
        bins, tails, form = (
            draw.choice([1, 2, 8]),
            draw.choice(["linear", "circular", None]),
            draw.choice(list(PARAMETERIZATIONS)),
        )
        count = 3 * bins + {"linear": -1, "circular": 0, None: 1}[tails]
        tensors = {
            "x": tensor(draw, (batch, dim), dtype, wild),
            "parameters": tensor(draw, (batch, dim, count), dtype, wild),
        }
        options = {"bins": bins, "tails": tails, "parameterization": form, "inverse": draw.random() < 0.5}
        options["tail_bound"] = draw.choice([0.5, 3.0, 1e3])
    right = draw.random() < 0.5
    if not right:
        spoilt(draw, tensors, options)

    def call(exact: bool = False) -> Any:
        given = {
            key: t.double() if exact and isinstance(t, Tensor) and t.is_floating_point() else t
            for key, t in tensors.items()
        }
        result = getattr(functional, name)(**given, **options)
        return result if isinstance(result, tuple) else (result,)

    found = refused_or(call)
    if not right or found is None:
        assert not right, (name, options)
        return
    with backend("reference"):
        expected, exact = call(), call(exact=True)
    for ours, theirs, truth in zip(found, expected, exact, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if not wild and tame(theirs.double(), truth):
            slack = {2: 3e-2, 4: 2e-4, 8: 1e-9}[dtype.itemsize]
            # where the value hangs on the last bits of the input, the definition is as far off
            own = (theirs.double() - truth).abs().max().item() if truth.numel() else 0.0
            torch.testing.assert_close(ours.double(), truth, rtol=slack, atol=slack * 10 + 4 * own)
        elif not wild:
            assert bool((ours.isfinite() == theirs.isfinite()).all())


def modules(draw: Random, folder: Path) -> None:
    """A flow of drawn sizes, right or wrong: it maps there and back, or says in a line what it can't take."""
    dim = draw.choice([1, 2, 3, 5, 8])
    context = draw.choice([0, 0, 1, 4])
    sizes: dict[str, Any] = {
        "n_flows": draw.choice([1, 2, 3]),
        "hidden_dim": draw.choice([1, 4, 9]),
        "hidden_depth": draw.randint(0, 2),
    }
    kinds: dict[str, Callable[..., Any]] = {
        "Flow": lambda: nn.Flow(dim, context_dim=context, **sizes),
        "NeuralSplineFlow": lambda: nn.NeuralSplineFlow(dim, context, **sizes),
        "MaskedAutoregressiveFlow": lambda: nn.MaskedAutoregressiveFlow(dim, context, **sizes),
        "RealNVP": lambda: nn.RealNVP(dim, context, **sizes),
        "IIN": lambda: IIN(dim, {"a": max(1, dim // 2)}, context_dim=context, **sizes),
    }
    wrong = draw.random() < 0.3
    if wrong:
        sizes[draw.choice([*sizes, "unknown"])] = draw.choice(WRONG)
    flow = refused_or(kinds[draw.choice(list(kinds))])
    if flow is None:
        return
    batch, wild = draw.choice([0, 1, 2, 9]), draw.random() < 0.3
    z = tensor(draw, (batch, dim), torch.float32, wild)
    told = tensor(draw, (batch, context), torch.float32, False) if context else None
    if draw.random() < 0.2:
        z = draw.choice([z.double(), z[:, :-1], z[None], z.to("meta"), draw.choice(WRONG)])
    elif draw.random() < 0.2:
        told = draw.choice([torch.ones(batch, context + 1), torch.ones(batch + 1, max(1, context)), "text", None])
    flow.eval()
    result = refused_or(lambda: flow(z, told))
    if result is None or wild:
        return
    values, logdet = getattr(result[0], "tensor", result[0]), result[1]
    assert values.shape == z.shape and logdet.shape == z.shape[:1]
    back = flow.decode(result[0], told) if isinstance(flow, IIN) else flow.inverse(values, told)[0]
    if tame(values, z, most=1e3):
        torch.testing.assert_close(back, z, rtol=1e-2, atol=1e-2)


def programs(draw: Random, folder: Path) -> None:
    """The text of a program with words changed, dropped or doubled: refused, or a program that says the same again and runs."""
    flow = draw.choice(
        [
            lambda: nn.NeuralSplineFlow(3, 2, n_flows=1, bins=3, hidden_dim=5, hidden_depth=1, mixing="lu"),
            lambda: nn.MaskedAutoregressiveFlow(3, 1, n_flows=2, hidden_dim=5, hidden_depth=1),
            lambda: nn.RealNVP(4, 0, n_flows=2, hidden_dim=3, hidden_depth=0),
        ]
    )()
    program = flow.program()
    words = program.text.split()
    for _ in range(draw.randint(0, 3)):
        at = draw.randrange(len(words))
        other = draw.choice([*words, "-1", "0", "1", "16777216", "99999999999", "1e30", "nan", "\0", "x" * 50])
        words[at : at + 1] = draw.choice([[other], [other], [], [words[at]] * 2])
    found = refused_or(lambda: FlowProgram.parse(" ".join(words)))
    if found is None:
        return
    assert FlowProgram.parse(found.text) == found
    tensors = list(flow._tensors())
    if found.dim > 64 or found.context > 64:
        return
    x = torch.randn(3, found.dim)
    told = torch.randn(3, found.context) if found.context else None
    given: dict[str, Any] = {"x": x, "context": told, "parameters": tensors, "program": found}
    options: dict[str, Any] = {"inverse": draw.random() < 0.5, "base": draw.random() < 0.5}
    if draw.random() < 0.3:
        spoilt(draw, given, options)
    result = refused_or(lambda: functional.flow_program(**given, **options))
    if result is not None and given["x"] is x:
        assert result[0].shape == x.shape and result[1].shape == (3,)


def made_run(folder: Path) -> Path:
    """Latents, a run and its evaluation, as the cases of files and commands damage them."""
    from iin_fast.train import Settings, run_folder, train

    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60)[:, None] % 3
    file = save_arrays(folder / "z.npz", {"z": z + labels, "labels": labels, "names": np.array(["digit"])})
    save_arrays(folder / "z.safetensors", {"z": z, "labels": labels, "names": np.array(["digit"])})
    settings = Settings({"digit": 2}, preset="paper", steps=4, n_flows=1, hidden_dim=4, batch=8, save_every=2)
    train(file, folder / "run", settings, accelerator="cpu")
    save_arrays(folder / "factors.npz", dict(run_folder.encode(folder / "run", file)))
    run_folder.evaluate(folder / "run", file, max_samples=30)
    return folder


def damaged(draw: Random, data: bytes) -> bytes:
    """Bytes with some flipped, cut off, doubled, or put elsewhere; JSON and zip have words of their own."""
    content = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at, to = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        kind = draw.randrange(7)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at:to]
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = content[at : min(to, at + 200)]
        elif kind == 4:
            content[at : at + 8] = draw.choice([b"\xff" * 8, bytes(8), b"9" * 8, b"null    ", b"-1e999  ", b"[[[[[[[["])
        elif kind == 5:
            number = draw.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
            content[at : at + 8] = number.to_bytes(8, "little")
        else:
            content[at:at] = draw.randbytes(draw.choice([1, 4, 100]))
    return bytes(content)


def files(draw: Random, folder: Path) -> None:
    """A file with damage: it loads, or is refused in a line."""
    name = draw.choice(["z.npz", "z.safetensors", "run/config.json", "run/model.safetensors", "both"])
    with _kept(folder, "run" if "run" in name or name == "both" else name) as place:
        for file in [place] if place.is_file() else [folder / name] if name != "both" else list(place.glob("*.*")):
            if file.suffix in (".json", ".safetensors", ".npz"):
                file.write_bytes(damaged(draw, file.read_bytes()))
        try:
            model = IIN.load(place) if place.is_dir() else load_latents(place)
        except (*REFUSED, FileNotFoundError) as error:
            assert str(place.name) in str(error), error
        else:
            assert model.dim > 0


class _kept:
    """A file or folder that may be damaged, and is as before at the end."""

    def __init__(self, folder: Path, name: str) -> None:
        self.place, self.copy = folder / name, folder / f"kept-{name}"

    def __enter__(self) -> Path:
        if self.place.is_dir():
            shutil.copytree(self.place, self.copy)
        else:
            shutil.copy(self.place, self.copy)
        return self.place

    def __exit__(self, *_: object) -> None:
        if self.place.is_dir():
            shutil.rmtree(self.place)
        else:
            self.place.unlink(missing_ok=True)
        self.copy.rename(self.place)


OPTIONS: dict[str, tuple[str, ...]] = {
    "encode": ("--out", "--device"),
    "decode": ("--out", "--context"),
    "swap": ("--out", "--factor", "--donors", "--seed"),
    "interpolate": ("--out", "--start", "--end", "--factor", "--steps"),
    "sample": ("--out", "--n", "--seed", "--context"),
    "score": ("--out", "--held-in"),
    "dims": ("--method", "--others", "--held-out", "--seed", "--context"),
    "report": ("--latents", "--decoder"),
    "train": ("--out", "--factors", "--steps", "--rho", "--batch", "--noise", "--context", "--resume", "--accelerator"),
}
VALUES = (
    "0",
    "1",
    "3",
    "-1",
    "nan",
    "1e400",
    "digit",
    "digit=2",
    "residual",
    "x",
    "",
    "cpu",
    "cuda",
    "linear",
    "all",
    "\0",
    "Ä",
    "run",
)


def commands(draw: Random, folder: Path) -> None:
    """A command with drawn words, now and then in a damaged run: 0, or one line and 2."""
    name = draw.choice(list(OPTIONS))
    places = [folder / part for part in ("z.npz", "z.safetensors", "factors.npz", "run", "out.npz", "none.npz")]
    words = [name]
    if name not in ("dims", "train"):
        words.append(str(folder / "run"))
    if name not in ("sample", "report"):
        words.append(str(folder / ("factors.npz" if name == "decode" else "z.npz")))
    if name == "train":
        words += "--steps 2 --n-flows 1 --hidden-dim 4 --accelerator cpu --preset paper".split()
        words += ["--out", str(folder / "new")]
    elif name not in ("dims", "report"):
        words += ["--out", str(folder / draw.choice(["out.npz", "out.safetensors", "out.txt"]))]
    for option in draw.sample(OPTIONS[name], draw.randint(0, len(OPTIONS[name]))):
        value = draw.choice([*VALUES, *map(str, places)])
        words += [option] if option == "--resume" else [option, value]
    if name == "interpolate":
        words += ["--start", "0", "--end", "1"]
    if draw.random() < 0.2:
        words[draw.randrange(1, len(words))] = draw.choice([*VALUES, *map(str, places)])
    words = [word.replace("\0", "") if "\0" in word else word for word in words]
    with _kept(folder, "run"):
        if draw.random() < 0.4:
            file = draw.choice([file for file in sorted((folder / "run").rglob("*.*")) if file.is_file()])
            file.write_bytes(damaged(draw, file.read_bytes()))
        result = CliRunner().invoke(app, words)
        shutil.rmtree(folder / "new", ignore_errors=True)
    output = result.output
    assert result.exit_code in (0, 2), (words, output, repr(result.exception))
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, repr(result.exception))
    if result.exit_code == 2 and not output.startswith("Usage"):
        lines = [line for line in output.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), (words, output)
