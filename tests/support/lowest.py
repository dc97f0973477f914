"""The lower bounds of setup.cfg as pip constraints: `python tests/support/lowest.py`."""

import configparser
from pathlib import Path

setup = configparser.ConfigParser()
setup.read(Path(__file__).resolve().parents[2] / "setup.cfg", encoding="utf-8")
parts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
for line in "\n".join(parts).splitlines():
    if ">=" in line:
        print(line.strip().replace(">=", "=="))
