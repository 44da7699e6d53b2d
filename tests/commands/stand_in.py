"""Stand in for `python` where scripts call it: record each command, and leave in no time what it would leave."""

import json
import os
import sys
from pathlib import Path

script, *argv = sys.argv[1:]
name = Path(script).name
if name == "phantom_summary.py":
    os.execv(sys.executable, [sys.executable, script, *argv])
if argv[:2] == ["mammo", "subset"]:  # whose trainings then come here
    os.execv(sys.executable, [sys.executable, script, *argv])
if name == "-m":  # python -m mammo COMMAND ...
    name, argv = " ".join(argv[:2]), argv[2:]
if name == "-c":  # scripts/activate.sh asks where to install
    print(Path(sys.argv[0]).parent)
    sys.exit()
with open(os.environ["COMMANDS"], "a") as file:
    file.write(json.dumps([name, *argv]) + "\n")
if name == "mammo phantom":
    Path(argv[0]).mkdir(parents=True)  # or fail, as the script does
if name == "sample_patches_combined.py":
    Path(argv[4]).mkdir(parents=True, exist_ok=True)
    Path(argv[4], "pat_lst.txt").write_text("P_00001\n")
elif "--out-dir" in argv:
    out = Path(argv[argv.index("--out-dir") + 1])
    out.mkdir(parents=True, exist_ok=True)
    Path(argv[argv.index("--best-model") + 1]).write_text("model")
    scores = {"accuracy": 0.75, "auc": {"neg": 0.8, "pos": 0.8}, "samples": 4}
    (out / "predictions.csv").write_text(
        "file,label,neg,pos,neg_flips,pos_flips\n"
        + "".join(
            f"{label}/P_{i}_LEFT_CC.png,{label},{1 - p},{p},{1 - p},{p}\n"
            for i, (label, p) in enumerate([("neg", 0.1), ("neg", 0.6), ("pos", 0.5), ("pos", 0.9)])
        )
    )
    (out / "history.csv").write_text("epoch,val_auc\n1,0.5\n2,0.7\n")
    (out / "metrics.json").write_text(json.dumps({"single": scores, "flips": scores}))
if os.environ.get("FAIL", "no command") in " ".join([name, *argv]):
    sys.exit(3)
