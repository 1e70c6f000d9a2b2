"""An index of the reports of a scale: experiments/results/SCALE/README.md.

Command:   python experiments/tables/index.py --scale smoke
"""

from __future__ import annotations

import json
import sys

from eso_jax.files import write_whole
from lab import Lab, main

NOT_HERE = {"Figures 1 to 3 and 6 to 15": "drawings and code: see eso_jax/model/masks.py and experiments/picture.py"}


def run(lab: Lab) -> None:
    lines = [f"# Results at --scale {lab.scale}", "", "Written by `bash experiments/run_all.sh --scale "
             f"{lab.scale}`; a report says its own command, machine, date and commit.", ""]
    for path in sorted(lab.results.glob("*.json")):
        report = json.loads(path.read_text("utf-8"))
        lines.append(f"- [{path.stem}]({path.stem}.md): {report['title']} ({'; '.join(report['measured'])})")
    lines += ["", "Not here:", "", *(f"- {name}: {why}" for name, why in NOT_HERE.items())]
    write_whole(lab.results / "README.md", "\n".join(lines) + "\n", "--results")


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
