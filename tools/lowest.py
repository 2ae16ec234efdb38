"""The lowest versions that settings.ini allows: an environment of them in build/lowest, and the fast tests in it.

python tools/lowest.py [TEST ...]    writes experiments/versions/lowest.json: when, with what, how many tests
                                     Without TEST all run that are not marked slow; else the record says which did.
"""
import json
import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
ENV = ROOT / "build" / "lowest"
PYTHON = ENV / "bin" / "python"
RECORD = ROOT / "experiments" / "versions" / "lowest.json"


def settings():
    "What settings.ini says."
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def extras(cfg):
    "Names of all extras."
    return [key.removesuffix("_requirements") for key in cfg if key.endswith("_requirements")]


def direct(cfg):
    "Names of the packages that settings.ini lists, sorted."
    lists = [cfg[key] for key in cfg if key == "requirements" or key.endswith("_requirements")]
    return sorted({re.match(r"[\w.-]+", line)[0] for text in lists for line in text.split("\n") if line})


def install(cfg):
    "Make the environment anew: each package that settings.ini names in the lowest version, the oldest Python there is."
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--clear", "--python", f">={cfg['min_python']}", ENV], check=True)
    whole = f".[{','.join(extras(cfg))}]"
    lowest = ["--resolution", "lowest-direct", "--editable", whole]
    subprocess.run([*uv, "pip", "install", "--python", PYTHON, *lowest], cwd=ROOT, check=True)


def installed(names):
    "Versions in the environment; None for what it does not have (another Python needs it)."
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "there = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps([platform.python_version(), {n: there.get(n) for n in sys.argv[1:]}]))"
    )
    done = subprocess.run([PYTHON, "-c", code, *names], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run_tests(chosen):
    "Run the fast tests; (counts, names of those that failed, seconds)."
    report, began = ROOT / "build" / "lowest.xml", time.perf_counter()
    path = f"{ENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | dict(PATH=path, PYTHONPATH=str(ROOT), MPLBACKEND="agg")
    command = [PYTHON, "-m", "pytest", "-n", "1", "-m", "not slow", f"--junit-xml={report}", *chosen]
    subprocess.run(command, cwd=ROOT, env=environment)  # what failed stands in its report
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts, failed, time.perf_counter() - began


def main(chosen):
    cfg = settings()
    install(cfg)
    counts, failed, seconds = run_tests(chosen)
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    python, versions = installed(direct(cfg))
    record = dict(
        date=time.strftime("%Y-%m-%d"),
        commit=subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        chosen=chosen or "all that are not slow",
        **counts,
        failed=failed,
        seconds=round(seconds),
        python=python,
        versions=versions,
    )
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{counts}: {RECORD.relative_to(ROOT)}")
    return bool(failed)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
