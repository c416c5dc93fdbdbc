"""What runs stood that were killed, ran long or had other versions, from bench/data."""

from __future__ import annotations

from table_rows import Row, rows, table, whole

KILLED = {
    "siva": "SiVA",
    "k-lst": "k-LST",
    "k-lst, features cached": "k-LST, features cached",
    "full": "full fine-tuning",
    "mezo": "MeZO, by its journal alone",
    "mezo, with checkpoints": "MeZO, with checkpoints",
    "compare": "`compare`, three cells",
}


def kills() -> str:
    """What was found of runs that were killed."""
    numbers = ("kills", "while_writing", "runs", "faults")
    body = ([KILLED[row["run"]], *(row[name] for name in numbers)] for row in rows("kills.csv"))
    return table(["run", "kills", "of these while something was written", "runs", "faults"], body)


def endurance() -> str:
    """What the process of a long run held: early, in the middle and late."""
    runs: dict[str, list[Row]] = {}
    for row in rows("endurance.csv"):
        runs.setdefault(row["method"], []).append(row)
    body = []
    for method, found in runs.items():
        found.sort(key=lambda row: int(row["step"]))
        for row in (found[0], found[len(found) // 2], found[-1]):
            numbers = (row[name] for name in ("resident_mb", "open_files", "live_tensors"))
            body.append([KILLED[method].partition(",")[0], whole(row["step"]), *numbers])
    return table(["run", "step", "resident memory, MB", "open files", "live tensors"], body)


def versions() -> str:
    """The wheel's tests in each environment."""
    body = []
    for row in rows("versions.csv"):
        given = [row[name] or "-" for name in ("python", "torch", "transformers", "peft", "triton")]
        tests = [row[name] or "-" for name in ("passed", "failed", "skipped")]
        body.append([row["environment"], *given, row["fault"] or row["tests"], *tests])
    heads = ["environment", "Python", "torch", "transformers", "PEFT", "Triton", "tests", "passed", "failed", "skipped"]
    return table(heads, body)
