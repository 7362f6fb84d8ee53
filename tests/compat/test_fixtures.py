"""What released versions wrote loads for ever, and gives what it gave: tests/fixtures/make.py wrote it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("lightning_fabric")

from fixtures import make
from safetensors.torch import load_file

from iin_fast import IIN, LinearIIN
from iin_fast.flow import FlowProgram
from iin_fast.train import state, train

VERSIONS = sorted(path for path in Path(make.__file__).parent.iterdir() if (path / "expected.safetensors").is_file())
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def version(request: pytest.FixtureRequest) -> Path:
    return request.param


def told() -> torch.Tensor:
    labels = make.latents().labels
    return torch.nn.functional.one_hot(labels[:8, 1], 2).float()


def test_there_are_versions() -> None:
    assert {"0.1.0", "0.2.0"} <= {path.name for path in VERSIONS}


def of(version: Path, name: str) -> Path:
    """A folder of a version, if the version had such a thing."""
    if version.name == "0.1.0" and name in ("inputs", "linear_run"):
        pytest.skip("0.1 had no inputs that are standardised")
    return version / name


@pytest.mark.parametrize("name", ["affine", "spline", "conditional", "inputs", "linear", *make.RUNS])
def test_models(version: Path, name: str) -> None:
    of(version, name)
    model = IIN.load(version / name)
    assert isinstance(model, LinearIIN) == (name == "linear")
    context = told() if name == "conditional" else None
    expected = load_file(version / "expected.safetensors")[name]
    torch.testing.assert_close(make.result(model, context), expected, **TOLERANCE)
    z = make.latents().z[:8]
    torch.testing.assert_close(model.decode(model.encode(z, context), context), z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", make.FLOWS)
def test_state_dicts_and_programs(version: Path, name: str) -> None:
    flow = make.FLOWS[name]()
    flow.load_state_dict(load_file(version / f"{name}.safetensors"))
    expected = load_file(version / "expected.safetensors")[name]
    torch.testing.assert_close(make.result(flow, told()), expected, **TOLERANCE)
    file = version / f"{name}.program"
    if file.is_file():
        program = FlowProgram.parse(file.read_text())
        assert program.text == file.read_text().strip()
        y, logdet = program_result(program, flow)
        torch.testing.assert_close(torch.cat([y, logdet[:, None]], 1), expected, **TOLERANCE)


def program_result(program: FlowProgram, flow: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    from iin_fast.functional import flow_program

    with torch.no_grad():
        return flow_program(make.latents().z[:8], told(), flow._tensors(), program)


@pytest.mark.parametrize("name", make.RUNS)
def test_a_run_folder_is_resumed(version: Path, name: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(of(version, name), tmp_path / "run"))
    before, progress = state.load(state.latest(run))
    assert progress.step == 6
    model = train(make.latents(), run, make.RUNS[name], accelerator="cpu", resume=True)
    for key, value in IIN.load(version / name).state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert before.config == model.config


def test_a_setting_that_an_older_version_did_not_know_is_no_obstacle(version: Path, tmp_path: Path) -> None:
    plain, older = (Path(shutil.copytree(version / "run", tmp_path / name)) for name in ("plain", "older"))
    record = json.loads((older / "run.json").read_text())
    del record["settings"]["clip"]
    record["versions"]["iin-fast"] = "0.0.9"
    (older / "run.json").write_text(json.dumps(record))
    wanted, found = (
        train(make.latents(), run, make.SETTINGS, accelerator="cpu", resume=True).state_dict() for run in (plain, older)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert "clip" in json.loads((older / "run.json").read_text())["settings"]
