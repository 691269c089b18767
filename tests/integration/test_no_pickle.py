"""Nothing that bakery publishes is a pickle, nothing that it reads runs code, and a damaged checkpoint is named."""

import ast
import os
import zipfile

import pytest
import torch
import yaml
from conftest import ROOT, save_tiny_model
from forked import run

MODULES = sorted((ROOT / "bakery").rglob("*.py"))
DISTILL = ("distill", "-c", "recipe.yaml", "--device", "cpu")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_reads_or_writes_pickles(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not calls & {"torch.load", "torch.save", "np.load", "np.save", "eval", "exec", "yaml.unsafe_load"}
    allowed = [
        k.value for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "allow_pickle"
    ]
    assert not allowed


@pytest.fixture
def home(tmp_path):
    recipe = {
        "caches": [{"path": str(ROOT / "data/golden")}],
        "student": {"model_name_or_path": str(save_tiny_model(tmp_path / "tiny")), "lora": {"r": 2}},
        "training": {"output_dir": "run", "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code, said = run(tmp_path, *DISTILL)
    assert code == 0, said
    return tmp_path


def is_pickle(path):
    """A pickle by itself, or the zip of one that torch.save writes."""
    if zipfile.is_zipfile(path):
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    return path.read_bytes()[:1] == b"\x80"


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def damage(file):
    file.write_bytes(file.read_bytes()[:-20])


def spoil(file):
    data = file.read_bytes()
    file.write_bytes((10**9).to_bytes(8, "little") + data[8:])


def test_what_is_published_holds_no_pickle_and_checkpoints_run_no_code(home):
    files = {str(p.relative_to(home / "run")): p for p in (home / "run").rglob("*") if p.is_file()}
    pickles = {name for name, path in files.items() if is_pickle(path)}
    # transformers keeps these for a run that goes on; they are read with weights_only, and never published
    own = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert pickles == {f"checkpoint-{step}/{name}" for step in (2, 4) for name in own}

    (home / "run/metrics.json").unlink()  # as if it had been broken off
    for name, change in (
        ("optimizer.pt", lambda file: torch.save({"state": Evil()}, file)),
        ("rng_state.pth", lambda file: torch.save(Evil(), file)),
        ("scheduler.pt", damage),
        ("adapter_model.safetensors", spoil),
    ):
        file = home / "run/checkpoint-4" / name
        whole = file.read_bytes()
        change(file)
        code, said = run(home, *DISTILL, "--resume")
        assert code == 1, said
        assert said[-1].startswith("bakery: run/checkpoint-4 does not load ("), name
        assert "Traceback" not in "".join(said)
        assert not (home / "pwned").exists()
        file.write_bytes(whole)
    code, said = run(home, *DISTILL, "--resume")
    assert code == 0, said
