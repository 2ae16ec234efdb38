"Everything about the package is said in settings.ini; this file hands it to setuptools and packs the notebooks."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
cfg = cfg["DEFAULT"]
name = cfg["lib_name"]
EXTRA = "_requirements"  # ends the key of an extra's list


def requirements(key):
    "The requirements under `key`, one a line."
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


class BuildWithNotebooks(build_py):
    "Pack nbs/*.ipynb as kdoct/_nbs: the stages run from an installed wheel too. A checkout keeps them in nbs/ alone."

    def packed(self):
        "Each notebook with its place in the built package."
        target = Path(self.build_lib) / name / "_nbs"
        return {nb: target / nb.name for nb in sorted((ROOT / "nbs").glob("*.ipynb"))}

    def run(self):
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(Path(self.build_lib) / name / "_nbs", ignore_errors=True)  # no notebook of an earlier build
        for source, target in self.packed().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode=1):
        notebooks = [] if self.editable_mode else [str(target) for target in self.packed().values()]
        return super().get_outputs(include_bytecode) + notebooks


setup(
    name=name,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=[word.strip() for word in cfg["keywords"].split(",")],
    author=cfg["author"],
    license_expression=cfg["license"],
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    packages=[name, *(f"{name}.{p}" for p in find_packages(name))],
    include_package_data=False,
    install_requires=requirements("requirements"),
    extras_require={
        key.removesuffix(EXTRA): requirements(key) for key in cfg if key.endswith(EXTRA)
    },
    entry_points={
        "console_scripts": requirements("console_scripts"),
        "nbdev": [f"{name} = {name}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
