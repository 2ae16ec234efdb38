"What importing loads, by the names of modules: it is time of every process."
import subprocess
import sys

COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "triton"}
HEAVY = {"torch", "torchvision", "timm", "fastai", "numpy", "pandas", "scipy", "matplotlib", "skimage", "sklearn"}


def loaded(code, names):
    "Which of these modules a process has loaded by some code."
    code = f"import sys\n{code}\nprint(*sorted({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_stages_load_torch_without_its_compiler():
    modules = (
        "kdoct.distill.student", "kdoct.evaluate.stage", "kdoct.explain.stage",
        "kdoct.deploy.predict", "kdoct.app.report", "torchvision.transforms.v2",
    )
    assert loaded(f"import {', '.join(modules)}", COMPILER | {"torch"}) == ["torch"]


def test_help_loads_no_library_of_numbers():
    code = "from kdoct.app.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert loaded(code, HEAVY | {"psutil", "papermill", "IPython"}) == []


def test_import_kdoct_loads_the_standard_library_only():
    assert loaded("import kdoct", HEAVY | {"fastcore", "pydantic", "typer", "filelock"}) == []


def test_a_torchvision_that_wants_more_gets_the_compiler(tmp_path):
    (tmp_path / "torchvision").mkdir()
    text = "import torch\nfrom torch._dynamo.utils import counters\nfrom torch.compiler import disable\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    code = f"sys.path.insert(0, {str(tmp_path)!r})\nimport kdoct, torchvision\ntorchvision.counters.clear()"
    assert loaded(code, {"torch._dynamo"}) == ["torch._dynamo"]
